"""Activation offload: what moves, when it goes and comes back, what of it the device holds; and no bit changes."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import pytest
import torch
from helpers.model import tiny_model
from torch import Tensor, nn

from internlm.model import offload
from internlm.model.offload import HostCopies, Offloading, PlainCopies
from internlm.model.ops.attention.causal_attention import VarlenMetadata

LAYERS = 4
LENGTHS = (15, 10)
KEYS = {"num_layers": LAYERS, "num_kv_attention_heads": 2}


def nonsense(dtype: torch.dtype) -> float:
    return math.nan if dtype.is_floating_point else 77


class LazyCopies:
    """A device whose copies are made when they are waited for, in order.

    What is read before that is nonsense, and so is what is copied from a tensor that was freed in the meantime.
    """

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []
        self._queue: list[tuple[weakref.ref[Tensor], weakref.ref[Tensor], bool]] = []
        self._num_done = self._num_started = 0

    def new_buffer(self, numel: int, dtype: torch.dtype) -> Tensor:
        self.buffers.append(torch.empty(numel, dtype=dtype).fill_(nonsense(dtype)))
        return self.buffers[-1]

    def is_host(self, tensor: Tensor) -> bool:
        return any(tensor.data_ptr() == buffer.data_ptr() for buffer in self.buffers)

    def start(self, copies: Sequence[tuple[Tensor, Tensor]]) -> object:
        for target, source in copies:
            to_host = self.is_host(target)
            if not to_host:
                target.fill_(nonsense(target.dtype))
            self._queue.append((weakref.ref(target), weakref.ref(source), to_host))
        self._num_started += len(copies)
        return self._num_started

    def wait(self, started: object) -> None:
        assert isinstance(started, int)
        while self._num_done < started:
            first, second, to_host = self._queue.pop(0)
            target, source = first(), second()
            self._num_done += 1
            if target is not None:
                target.fill_(nonsense(target.dtype)) if source is None else target.copy_(source)
            assert target is not None or to_host, "a copy writes to memory of the device that was freed"


def offloading_of(copies: HostCopies | None = None, **choice: Any) -> Offloading:
    offloading = Offloading(copies or PlainCopies(), smallest=1, **choice)
    offloading.log = []
    return offloading


def forward(model: nn.Module, seed: int = 0) -> Tensor:
    ids = torch.randint(97, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(seed))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    logits = model.logits(model(ids, positions, VarlenMetadata.of(LENGTHS)))  # type: ignore[operator]
    return logits.float().square().mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("copies", [PlainCopies, LazyCopies])
@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
@pytest.mark.parametrize(
    "recomputing", [{}, {"checkpoint": 0.5}, {"checkpoint": 1.0, "checkpoint_save_policy": "matmuls"}]
)
@pytest.mark.parametrize(
    ("model_type", "layers"),
    [("INTERNLM2", range(LAYERS)), ("LLAMA2", range(2)), ("QWEN3", (1, 3)), ("GEMMA", range(LAYERS))],
)
def test_no_bit_changes(model_type: str, layers: Any, recomputing: dict[str, Any], dtype: str, copies: Any) -> None:
    keys = {**KEYS, "dtype": dtype}
    plain, moved = tiny_model(model_type, **keys), tiny_model(model_type, **keys, **recomputing)
    moved.offloading = offloading_of(copies(), saved_of=layers)
    for model in (plain, moved):
        for micro_batch in range(2):
            forward(model, micro_batch).backward()
    assert_same_bits(gradients(moved), gradients(plain))
    assert {number for _, number in moved.offloading.log} == set(layers)


@pytest.mark.parametrize("copies", [PlainCopies, LazyCopies])
def test_several_micro_batches_may_be_in_flight(copies: Any) -> None:
    """As in a pipeline: each forward pass has its own tensors, whatever the order of the backward passes."""
    plain, moved = tiny_model("INTERNLM2", **KEYS), tiny_model("INTERNLM2", **KEYS)
    moved.offloading = offloading_of(copies(), saved_of=range(LAYERS))
    order = ("F0", "F1", "B0", "F2", "B1", "F3", "B3", "B2")
    for model in (plain, moved):
        losses = {}
        for action, number in order:
            if action == "F":
                losses[number] = forward(model, int(number))
            else:
                losses.pop(number).backward()
    assert_same_bits(gradients(moved), gradients(plain))


def test_copies_go_one_layer_behind_and_come_back_one_layer_ahead() -> None:
    model = tiny_model("INTERNLM2", **KEYS)
    model.offloading = offloading_of(saved_of=range(LAYERS))
    log = model.offloading.log
    for number, layer in model.layers.items():
        layer.register_forward_pre_hook(lambda *_, n=number: log.append(("forward", int(n))))
        layer.feed_forward.w2.register_full_backward_pre_hook(lambda *_, n=number: log.append(("backward", int(n))))
    loss = forward(model)
    # A layer leaves the device when the next one has computed.
    assert log == [
        ("forward", 0), ("copy", 0),
        ("forward", 1), ("copy", 1), ("release", 0),
        ("forward", 2), ("copy", 2), ("release", 1),
        ("forward", 3), ("copy", 3), ("release", 2),
    ]  # fmt: skip
    log.clear()
    loss.backward()
    # The last layer is still there.
    assert log == [
        ("backward", 3), ("load", 2),
        ("backward", 2), ("load", 1),
        ("backward", 1), ("load", 0),
        ("backward", 0),
    ]  # fmt: skip


def test_layers_that_stay_are_between_those_that_go() -> None:
    model = tiny_model("INTERNLM2", **KEYS)
    model.offloading = offloading_of(saved_of=(0, 2))
    log = model.offloading.log
    loss = forward(model)
    assert log == [("copy", 0), ("release", 0), ("copy", 2), ("release", 2)]
    log.clear()
    loss.backward()
    assert log == [("load", 2), ("load", 0)]


def test_the_device_holds_two_layers_at_most() -> None:
    """Of eight, in the forward and in the backward pass."""
    model = tiny_model("INTERNLM2", **{**KEYS, "num_layers": 8})
    model.offloading = offloading_of(saved_of=range(8))
    layers: list[Any] = []
    made = offload._Layer.__init__

    def note(layer: Any, *args: Any) -> None:
        made(layer, *args)
        layers.append(layer)

    def count(*_: Any) -> None:
        present = [any(memory.tensor is not None for memory in layer.memories()) for layer in layers]
        counts.append(sum(present))

    counts: list[int] = []
    peaks = []
    with patch.object(offload._Layer, "__init__", note):
        for layer in model.layers.values():
            layer.feed_forward.w2.register_forward_hook(count)
            layer.feed_forward.w2.register_full_backward_pre_hook(count)
            layer.attention.wo.register_full_backward_hook(count)
        loss = forward(model)
        peaks.append(max(counts))
        counts.clear()
        loss.backward()
        peaks.append(max(counts))
    assert peaks == [2, 2]


def test_without_gradients_nothing_happens() -> None:
    model = tiny_model("INTERNLM2", **KEYS)
    model.offloading = offloading_of(saved_of=range(LAYERS), kept_of=range(LAYERS))
    with torch.no_grad():
        forward(model)
    assert model.offloading.log == []


def test_host_memory_is_used_again_and_given_back_with_the_graph() -> None:
    copies = LazyCopies()
    model = tiny_model("INTERNLM2", **KEYS)
    model.offloading = offloading_of(copies, saved_of=range(LAYERS))
    gc.disable()
    try:
        forward(model).backward()
        made = len(copies.buffers)
        for number in range(3):
            forward(model, number).backward()
        assert len(copies.buffers) == made, "the buffers of the first pass serve all"
        losses = [forward(model, number) for number in range(2)]
        assert len(copies.buffers) == 2 * made
        del losses
        forward(model).backward()
        assert len(copies.buffers) == 2 * made
    finally:
        gc.enable()


def test_parameters_and_small_tensors_stay() -> None:
    model = tiny_model("LLAMA2", **KEYS)
    moved: list[Tensor] = []

    class Noting(PlainCopies):
        def start(self, copies: Sequence[tuple[Tensor, Tensor]]) -> None:
            moved.extend(source for _, source in copies)
            super().start(copies)

    offloading = Offloading(Noting(), saved_of=range(LAYERS), smallest=48 * 25 * 4)
    model.offloading = offloading
    forward(model)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert moved and all(tensor.untyped_storage().data_ptr() not in parameters for tensor in moved)
    assert all(tensor.nbytes >= 48 * 25 * 4 for tensor in moved)
    # The inputs and outputs of both norms, the query, attention's output, three tensors of the MLP.
    assert len(moved) == LAYERS * 9


def test_a_graph_may_be_used_twice() -> None:
    plain, moved = tiny_model("INTERNLM2", **KEYS), tiny_model("INTERNLM2", **KEYS)
    moved.offloading = offloading_of(saved_of=range(LAYERS))
    for model in (plain, moved):
        loss = forward(model)
        loss.backward(retain_graph=True)
        loss.backward()
    assert_same_bits(gradients(moved), gradients(plain))


def test_a_graph_may_be_dropped_half_used() -> None:
    """The layer before was on its way back: its copies must not land in what was freed."""
    plain, moved = tiny_model("INTERNLM2", **KEYS), tiny_model("INTERNLM2", **KEYS)
    moved.offloading = offloading_of(LazyCopies(), saved_of=range(LAYERS))
    for model in (plain, moved):
        torch.autograd.grad(forward(model), list(model.layers["3"].parameters()))
        forward(model).backward()
    assert_same_bits(gradients(moved), gradients(plain))


@pytest.mark.parametrize("copies", [PlainCopies, LazyCopies])
@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
def test_what_recomputation_keeps_may_move(dtype: str, copies: Any) -> None:
    keys = {**KEYS, "dtype": dtype}
    plain = tiny_model("INTERNLM2", **keys)
    moved = tiny_model("INTERNLM2", checkpoint=0.75, checkpoint_save_policy="attention", **keys)
    moved.offloading = offloading_of(copies(), kept_of=range(3))
    for layer in list(moved.layers.values())[:3]:
        layer.store = moved.offloading
    for model in (plain, moved):
        losses = [forward(model, number) for number in range(2)]
        for loss in losses:
            loss.backward()
    assert_same_bits(gradients(moved), gradients(plain))
    assert [entry for entry in moved.offloading.log if entry[0] == "copy"] == [("copy", n) for n in range(3)] * 2


def test_what_is_saved_and_what_is_kept_may_both_move() -> None:
    """Then a recomputed layer leaves nothing but small tensors on the device."""
    plain = tiny_model("INTERNLM2", **KEYS)
    moved = tiny_model("INTERNLM2", checkpoint=1.0, checkpoint_save_policy="attention", **KEYS)
    moved.offloading = offloading_of(LazyCopies(), saved_of=range(LAYERS), kept_of=range(LAYERS))
    for layer in moved.layers.values():
        layer.store = moved.offloading
    for model in (plain, moved):
        forward(model).backward()
    assert_same_bits(gradients(moved), gradients(plain))
