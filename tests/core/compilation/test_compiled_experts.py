"""Compiled expert layers: one graph, with router and experts, where ranks exchange no tokens; the numbers of plain ones
everywhere."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from helpers.ranks import RankPool
from helpers.tiny import global_batch, micro_batch, tiny_config, tiny_engine
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

from internlm.core.compilation.compile_layers import compile_layers
from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.engine import Engine
from internlm.core.parallel.fsdp import apply_fsdp
from internlm.core.parallel.model_parallel import ParallelOptions, parallel_of
from internlm.core.parallel.parallelize import parallelize
from internlm.model.moe.router import RouterLosses, routers_of
from internlm.model.moe.sample_tokens import SampleTokens
from internlm.model.ops.attention.causal_attention import VarlenMetadata
from internlm.model.ops.cross_entropy import linear_cross_entropy
from internlm.model.recompute import SAVE_POLICIES, SavePolicy
from internlm.model.registry import build_model

LENGTHS = (7, 1, 12, 4)
EXPERTS = {"num_experts": 4, "top_k": 2, "moe_type": "Dropless"}
GROUPED = {"selection_bias": True, "scoring_func": "sigmoid", "n_group": 2, "topk_group": 1}

# Family, changes, number of kinds of layers.
ONE_GRAPH: dict[str, tuple[str, dict[str, Any], int]] = {
    "plain": ("QWEN3MOE", {}, 1),
    "sigmoid_gate": ("QWEN2MOE", {"num_shared_experts": 1}, 1),
    "softmax_gate": ("MIXTRALMOE", {"num_shared_experts": 1, "checkpoint": 1.0}, 1),
    "groups": ("QWEN3MOE", {"moe_layer_kwargs": GROUPED, "checkpoint": 1.0, "checkpoint_save_policy": "matmuls"}, 1),
    "bf16": ("QWEN3MOE", {"dtype": "torch.bfloat16", "checkpoint": 1.0, "checkpoint_save_policy": "attention"}, 1),
    "dense_first": ("OLMOE", {"first_k_dense_replace": 1, "num_layers": 3}, 2),
}

# Family, changes, options.
CUT: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "capacity": ("MIXTRALMOE", {"moe_type": "GShard", "num_shared_experts": 1}, {}),
    "noise": ("QWEN3MOE", {"moe_layer_kwargs": {"noisy_gate_policy": "Jitter"}, "checkpoint": 1.0}, {}),
    "sinks": ("GPT_OSS", {"sliding_window": 5}, {}),
    "float8": ("QWEN3MOE", {"dtype": "torch.bfloat16", "intermediate_size": 64}, {"float8_layers": frozenset({0, 1})}),
}

LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "exchanged": ({"world_size": 2, "expert": 2}, {}),
    "mtp": ({"world_size": 2, "tensor": 2, "mode": "mtp", "expert": 2}, {}),
    "split": ({"world_size": 2, "tensor": 2, "mode": "msp", "expert_inner": 2}, {}),
    "gathered": ({"world_size": 2, "weight": 2, "expert_inner": 2, "mode": "isp"}, {}),
    "postponed": ({"world_size": 1}, {"postpone_weight_gradients": True}),
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def build(
    family: str, changes: dict[str, Any], layout: dict[str, Any] | None = None, options: dict[str, Any] | None = None
) -> nn.Module:
    context = ParallelContext.create(ParallelLayout(**layout) if layout else None)
    with torch.device("meta"):
        model = build_model(family, tiny_config(**{**EXPERTS, **changes}))
    return parallelize(model, context, seed=7, options=ParallelOptions(**(options or {})))


class Numbers:
    """Loss, gradients and what routers count in one pass."""

    def __init__(self, model: nn.Module, lengths: tuple[int, ...] = LENGTHS) -> None:
        micro, parallel = micro_batch(0, lengths), parallel_of(model)
        num_tokens = sum(lengths)
        documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        is_text = torch.arange(num_tokens) < num_tokens - 3
        for router in routers_of([model]):
            router.begin_step(RouterLosses(0.1, 0.01, 0.02), torch.tensor(0.5))
            if router.num_sharing == 1:
                router.sample = SampleTokens(is_text, is_text.sum(), documents, 1 << len(lengths).bit_length())
        model.zero_grad()
        hidden = model(micro.input_ids, micro.position_ids, VarlenMetadata.of(lengths))
        output = parallel.head_loss(model, hidden, micro.labels, micro.type_ids, linear_cross_entropy)
        output.loss.loss_sum.backward()
        parallel.end_backward()
        self.loss = output.loss.loss_sum.detach()
        self.gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        self.sums = torch.stack([router.sums().values for router in routers_of([model])])
        self.num_experts = routers_of([model])[0].form.num_experts

    def assert_close_to(self, other: Numbers) -> None:
        """Up to a few roundings in a handful of operations a layer; counts are equal."""
        eps = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9}
        dtype = other.gradients["norm.weight"].dtype
        torch.testing.assert_close(self.loss, other.loss, rtol=16 * eps[dtype], atol=0.0)
        assert self.gradients.keys() == other.gradients.keys()
        for name, gradient in other.gradients.items():
            error = (self.gradients[name].double() - gradient.double()).norm()
            # Of routers too, in a model in bf16: the gradients that reach them are rounded so.
            assert error <= 16 * eps[dtype] * gradient.double().norm(), name
        counts = slice(0, self.num_experts)
        assert torch.equal(self.sums[:, counts], other.sums[:, counts])
        torch.testing.assert_close(self.sums, other.sums, rtol=16 * eps[dtype], atol=16 * eps[dtype])


@pytest.mark.parametrize("name", ONE_GRAPH)
def test_a_layer_with_experts_is_one_graph(name: str) -> None:
    """All layers of a kind share it; a graph break would raise."""
    family, changes, kinds = ONE_GRAPH[name]
    counter = CompileCounterWithBackend("aot_eager")
    model = compile_layers(build(family, changes), backend=counter)
    Numbers(model).assert_close_to(Numbers(build(family, changes)))
    assert counter.frame_count == kinds


def test_other_documents_are_no_reason_to_compile_again() -> None:
    """Once for any number of documents, and for each bound on their number."""
    counter = CompileCounterWithBackend("aot_eager")
    plain, model = build("QWEN3MOE", {}), compile_layers(build("QWEN3MOE", {}), backend=counter)
    for lengths in (LENGTHS, (11, 13), (24,), (1, 2, 3, 8, 10)):
        Numbers(model, lengths).assert_close_to(Numbers(plain, lengths))
    compiled = counter.frame_count
    assert compiled <= 4
    for lengths in ((2, 3, 5, 14), (9, 15), (8, 8, 8), (1, 2, 3, 4, 5, 9)):
        Numbers(model, lengths)
    assert counter.frame_count == compiled


@pytest.mark.parametrize("name", ["plain", "groups"])
def test_evaluation(name: str) -> None:
    family, changes, _ = ONE_GRAPH[name]
    models = build(family, changes), compile_layers(build(family, changes), backend="aot_eager")
    micro, varlen = micro_batch(0, LENGTHS), VarlenMetadata.of(LENGTHS)
    for each in models:
        for router in routers_of([each]):
            router.begin_step(RouterLosses(0.1), torch.tensor(1.0))
    with torch.no_grad():
        expected, found = (each(micro.input_ids, micro.position_ids, varlen) for each in models)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not any(router.sums().values.any() for router in routers_of(models))


@pytest.mark.parametrize("policy", SAVE_POLICIES)
def test_no_choice_is_repeated(policy: SavePolicy) -> None:
    """The graph of the backward pass has the GEMMs of the policy again, but never the choice of experts."""
    graphs: list[Counter[str]] = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(Counter(str(node.target) for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=count, partition_fn=min_cut_rematerialization_partition)
    changes = {} if policy == "everything" else {"checkpoint": 1.0, "checkpoint_save_policy": policy}
    model = compile_layers(build("QWEN3MOE", changes), backend=backend)  # type: ignore[arg-type]
    Numbers(model).assert_close_to(Numbers(build("QWEN3MOE", {})))
    forward, backward = graphs
    chosen, grouped = "internlm.choose_experts.default", "internlm.grouped_linear.default"
    assert (forward[chosen], backward[chosen]) == (1, 0)
    # The result of w2 is needed for the weights' gradient.
    assert (forward[grouped], backward[grouped]) == (2, 0 if policy in ("everything", "matmuls") else 2)


@pytest.mark.parametrize("name", CUT)
def test_layers_that_are_compiled_in_parts(name: str) -> None:
    family, changes, options = CUT[name]
    model = compile_layers(build(family, changes, options=options), backend="aot_eager")
    Numbers(model).assert_close_to(Numbers(build(family, changes, options=options)))


def _in_layout(name: str, policy: SavePolicy, compiled: bool) -> Numbers:
    torch._dynamo.reset()
    recomputing = {} if policy == "everything" else {"checkpoint": 1.0, "checkpoint_save_policy": policy}
    model = build("MIXTRALMOE", {"num_shared_experts": 1, **recomputing}, *LAYOUTS[name])
    if compiled:
        compile_layers(model, backend="aot_eager")
    result = Numbers(model)
    parallel_of(model).context.close()
    return result


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("exchanged", "everything"),
        ("exchanged", "nothing"),
        ("mtp", "matmuls"),
        ("split", "nothing"),
        ("gathered", "nothing"),
        ("postponed", "everything"),
    ],
)
def test_modes(name: str, policy: SavePolicy, ranks: Callable[[int], RankPool]) -> None:
    pool = ranks(LAYOUTS[name][0]["world_size"])
    plain = pool.run(_in_layout, name, "everything", False)
    for found, expected in zip(pool.run(_in_layout, name, policy, True), plain, strict=True):
        found.assert_close_to(expected)


def _sharded(compiled: bool) -> list[float]:
    torch._dynamo.reset()
    model = build("QWEN2MOE", {"num_shared_experts": 1, "checkpoint": 1.0}, {"world_size": 2})
    context = parallel_of(model).context
    if compiled:
        compile_layers(model, backend=CompileCounterWithBackend("aot_eager"))
    engine: Engine = tiny_engine(context, model=apply_fsdp(model, context), clip_grad_norm=0.5)
    batches = (global_batch(step, rank=context.rank, world_size=2) for step in range(3))
    numbers = [engine.train_step(batch, 3e-3) for batch in batches]
    context.close()
    return [float(value) for result in numbers for value in (result.loss, result.grad_norm)]


def test_fsdp(ranks: Callable[[int], RankPool]) -> None:
    pool = ranks(2)
    expected, found = pool.run(_sharded, False)[0], pool.run(_sharded, True)
    assert found[0] == found[1] == pytest.approx(expected, rel=1e-5)


def test_generated_code() -> None:
    changes = {"num_shared_experts": 1, "checkpoint": 1.0, "checkpoint_save_policy": "attention"}
    Numbers(compile_layers(build("QWEN2MOE", changes))).assert_close_to(Numbers(build("QWEN2MOE", changes)))


def test_a_copy_of_a_model_counts_for_itself() -> None:
    model = build("QWEN3MOE", {})
    other = copy.deepcopy(model)
    Numbers(model)
    first = routers_of([model])[0].sums().values.clone()
    Numbers(other, (24,))
    assert torch.equal(routers_of([model])[0].sums().values, first)
    assert not torch.equal(routers_of([other])[0].sums().values, first)


def test_a_replayed_choice_is_used_in_a_compiled_layer() -> None:
    """Set after the first pass, without compiling anew."""
    counter = CompileCounterWithBackend("aot_eager")
    plain, model = build("QWEN3MOE", {}), build("QWEN3MOE", {})
    compile_layers(model, backend=counter)
    Numbers(model)
    compiled = counter.frame_count
    for each in (plain, model):
        for router in routers_of([each]):
            router.replay = lambda experts: (experts + 1) % 4
    Numbers(model).assert_close_to(Numbers(plain))
    assert counter.frame_count == compiled
