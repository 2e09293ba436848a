"""The exchange of numbers of rows: when it starts and ends, how often the host waits, and who reads its result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import RankPool
from helpers.tiny import micro_batch, tiny_config
from torch import Tensor, nn

from internlm.core.compilation.compile_layers import compile_layers
from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.experts.exchanged_experts import ExchangedExperts
from internlm.core.parallel.layers import layers_of
from internlm.core.parallel.model_parallel import parallel_of
from internlm.core.parallel.parallelize import parallelize
from internlm.model.moe.feed_forward import MoeFeedForward
from internlm.model.offload import Offloading
from internlm.model.ops.attention.causal_attention import VarlenMetadata
from internlm.model.ops.cross_entropy import linear_cross_entropy
from internlm.model.recompute import SavePolicy
from internlm.model.registry import build_model
from internlm.utils.copy_stream import CopyStream, QueuedCopy

LENGTHS = (7, 1, 12, 4)
NUM_LAYERS = 2

Events = list[str]


def build(policy: SavePolicy, num_shared: int = 1) -> nn.Module:
    """A mixture whose experts are dealt to two data ranks."""
    recomputing = {} if policy == "everything" else {"checkpoint": 1.0, "checkpoint_save_policy": policy}
    experts = {"num_experts": 4, "top_k": 2, "moe_type": "Dropless", "num_shared_experts": num_shared}
    with torch.device("meta"):
        model = build_model("QWEN2MOE", tiny_config(**experts, **recomputing))
    return parallelize(model, ParallelContext.create(ParallelLayout(world_size=2, expert=2)), seed=7)


def gradients(model: nn.Module, events: Events | None = None) -> dict[str, Tensor]:
    parallel = parallel_of(model)
    micro = micro_batch(parallel.context.rank, LENGTHS)
    hidden = model(micro.input_ids, micro.position_ids, VarlenMetadata.of(LENGTHS))
    if events is not None:
        events.append("backward")
    output = parallel.head_loss(model, hidden, micro.labels, micro.type_ids, linear_cross_entropy)
    output.loss.loss_sum.backward()
    parallel.end_backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


class _Recorded(QueuedCopy[Any]):
    def __init__(self, result: Any, events: Events) -> None:
        super().__init__(result)
        self._events = events

    def synchronize(self) -> Any:
        self._events.append("host waits")
        return super().synchronize()


class _RecordingStream(CopyStream):
    def __init__(self, events: Events) -> None:
        self._events = events

    def run(self, copy: Callable[[], Any]) -> QueuedCopy[Any]:
        return _Recorded(copy(), self._events)


class _LateWork:
    """Its result arrives only when it is waited for; until then, there are other numbers."""

    def __init__(self, output: Tensor, arrived: Tensor, events: Events) -> None:
        self._output, self._arrived, self._events = output, arrived, events

    def wait(self, *_: Any) -> None:
        self._events.append("counts arrive")
        self._output.copy_(self._arrived)


@contextmanager
def late_exchanges(events: Events) -> Iterator[None]:
    exchange = dist.all_to_all_single

    def recorded(output: Tensor, tensor: Tensor, *args: Any, async_op: bool = False, **kwargs: Any) -> Any:
        if not async_op:
            events.append("rows")
            return exchange(output, tensor, *args, **kwargs)
        events.append("counts start")
        arrived = torch.empty_like(output)
        exchange(arrived, tensor, *args, **kwargs)
        output.fill_(-(1 << 40))
        return _LateWork(output, arrived, events)

    with patch.object(dist, "all_to_all_single", recorded):
        yield


def record(model: nn.Module) -> tuple[Events, dict[str, Tensor]]:
    events: Events = []
    for module in model.modules():
        if isinstance(module, MoeFeedForward) and module.shared is not None:
            module.shared.register_forward_pre_hook(lambda *_: events.append("shared experts"))
        if isinstance(module, ExchangedExperts):
            module._stream = _RecordingStream(events)
    with late_exchanges(events):
        return events, gradients(model, events)


def events_of_a_pass(policy: SavePolicy, num_shared: int) -> tuple[Events, Events]:
    """Those of the forward and those of the backward pass."""
    events, _ = record(model := build(policy, num_shared))
    parallel_of(model).context.close()
    place = events.index("backward")
    return events[:place], events[place + 1 :]


@pytest.mark.parametrize("policy", ["everything", "matmuls", "nothing"])
@pytest.mark.parametrize("num_shared", [0, 1])
def test_the_exchange_hides_behind_shared_experts_and_the_host_waits_once(
    num_shared: int, policy: SavePolicy, ranks: Callable[[int], RankPool]
) -> None:
    layer = ["counts start", *["shared experts"] * num_shared, "counts arrive", "host waits", "rows", "rows"]
    for forward, backward in ranks(2).run(events_of_a_pass, policy, num_shared):
        assert forward == layer * NUM_LAYERS
        # Recomputation exchanges rows again, but not their numbers.
        assert set(backward) <= {"rows", "shared experts"}
        assert backward.count("rows") >= 2 * NUM_LAYERS


def names_of_changed(policy: SavePolicy, offloaded: bool, compiled: bool) -> list[str]:
    """The gradients that are not bit-equal to those of numbers that arrive at once."""
    torch._dynamo.reset()
    models = [build(policy) for _ in range(2)]
    for model in models:
        if offloaded:
            _offload(model, is_stored=policy != "everything")
        if compiled:
            compile_layers(model, backend="aot_eager")
    _, found = record(models[0])
    expected = gradients(models[1])
    for model in models:
        parallel_of(model).context.close()
    return [name for name in expected if not torch.equal(found[name], expected[name])]


def _offload(model: nn.Module, *, is_stored: bool) -> None:
    layers = {"store_layers" if is_stored else "autograd_layers": range(NUM_LAYERS)}
    offloading = Offloading(CopyStream(), smallest=1, **layers)  # type: ignore[arg-type]
    model.offloading = offloading  # type: ignore[assignment]
    if is_stored:
        for layer in layers_of(model):
            layer.store = offloading  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("policy", "offloaded", "compiled"),
    [
        ("everything", True, False),
        ("matmuls", True, False),
        ("nothing", True, False),
        ("attention", False, True),
        ("everything", True, True),
    ],
)
def test_nothing_reads_the_numbers_before_they_have_arrived(
    policy: SavePolicy, offloaded: bool, compiled: bool, ranks: Callable[[int], RankPool]
) -> None:
    assert ranks(2).run(names_of_changed, policy, offloaded, compiled) == [[], []]
