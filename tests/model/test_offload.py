"""Activation offload: what moves, when it goes and comes back, what of it the device holds; and no bit changes."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import pytest
import torch
from helpers.late_copies import LateCopyStream
from helpers.model import tiny_model
from torch import Tensor, nn

from internlm.model import offload
from internlm.model.offload import Offloading
from internlm.model.ops.attention.causal_attention import VarlenMetadata
from internlm.utils.copy_stream import CopyStream, QueuedCopy

LAYERS = 4
LENGTHS = (15, 10)
KEYS = {"num_layers": LAYERS, "num_kv_attention_heads": 2}


def offloading_of(stream: CopyStream | None = None, **choice: Any) -> Offloading:
    offloading = Offloading(stream or CopyStream(), smallest=1, **choice)
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


@pytest.mark.parametrize("stream", [CopyStream, LateCopyStream])
@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
@pytest.mark.parametrize(
    "recomputing", [{}, {"checkpoint": 0.5}, {"checkpoint": 1.0, "checkpoint_save_policy": "matmuls"}]
)
@pytest.mark.parametrize(
    ("model_type", "layers"),
    [("INTERNLM2", range(LAYERS)), ("LLAMA2", range(2)), ("QWEN3", (1, 3)), ("GEMMA", range(LAYERS))],
)
def test_no_bit_changes(model_type: str, layers: Any, recomputing: dict[str, Any], dtype: str, stream: Any) -> None:
    keys = {**KEYS, "dtype": dtype}
    plain, moved = tiny_model(model_type, **keys), tiny_model(model_type, **keys, **recomputing)
    moved.offloading = offloading_of(stream(), autograd_layers=layers)
    for model in (plain, moved):
        for micro_batch in range(2):
            forward(model, micro_batch).backward()
    assert_same_bits(gradients(moved), gradients(plain))
    assert {number for _, number in moved.offloading.log} == set(layers)


@pytest.mark.parametrize("stream", [CopyStream, LateCopyStream])
def test_several_micro_batches_may_be_in_flight(stream: Any) -> None:
    """As in a pipeline: each forward pass has its own tensors, whatever the order of the backward passes."""
    plain, moved = tiny_model("INTERNLM2", **KEYS), tiny_model("INTERNLM2", **KEYS)
    moved.offloading = offloading_of(stream(), autograd_layers=range(LAYERS))
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
    model.offloading = offloading_of(autograd_layers=range(LAYERS))
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
    model.offloading = offloading_of(autograd_layers=(0, 2))
    log = model.offloading.log
    loss = forward(model)
    assert log == [("copy", 0), ("release", 0), ("copy", 2), ("release", 2)]
    log.clear()
    loss.backward()
    assert log == [("load", 2), ("load", 0)]


def test_the_device_holds_two_layers_at_most() -> None:
    """Of eight, in the forward and in the backward pass."""
    model = tiny_model("INTERNLM2", **{**KEYS, "num_layers": 8})
    model.offloading = offloading_of(autograd_layers=range(8))
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
    model.offloading = offloading_of(autograd_layers=range(LAYERS), store_layers=range(LAYERS))
    with torch.no_grad():
        forward(model)
    assert model.offloading.log == []


def test_host_memory_is_used_again_and_given_back_with_the_graph() -> None:
    stream = LateCopyStream()
    model = tiny_model("INTERNLM2", **KEYS)
    model.offloading = offloading_of(stream, autograd_layers=range(LAYERS))
    gc.disable()
    try:
        forward(model).backward()
        made = len(stream.buffers)
        for number in range(3):
            forward(model, number).backward()
        assert len(stream.buffers) == made, "the buffers of the first pass serve all"
        losses = [forward(model, number) for number in range(2)]
        assert len(stream.buffers) == 2 * made
        del losses
        forward(model).backward()
        assert len(stream.buffers) == 2 * made
    finally:
        gc.enable()


def test_parameters_and_small_tensors_stay() -> None:
    model = tiny_model("LLAMA2", **KEYS)
    moved: list[Tensor] = []

    class Noting(CopyStream):
        def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> QueuedCopy[None]:
            moved.extend(source for _, source in pairs)
            return super().copy(pairs)

    offloading = Offloading(Noting(), autograd_layers=range(LAYERS), smallest=48 * 25 * 4)
    model.offloading = offloading
    forward(model)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert moved and all(tensor.untyped_storage().data_ptr() not in parameters for tensor in moved)
    assert all(tensor.nbytes >= 48 * 25 * 4 for tensor in moved)
    # The inputs and outputs of both norms, the query, attention's output, three tensors of the MLP.
    assert len(moved) == LAYERS * 9


def test_copies_wait_for_the_computation_of_what_they_read() -> None:
    calls: list[str] = []

    class Noting(CopyStream):
        def wait_for_compute(self) -> None:
            calls.append("wait")

        def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> QueuedCopy[None]:
            calls.append("copy")
            return super().copy(pairs)

    model = tiny_model("INTERNLM2", **KEYS)
    model.offloading = offloading_of(Noting(), autograd_layers=range(LAYERS))
    forward(model).backward()
    # To the host from each layer, and back to all but the last.
    assert calls == ["wait", "copy"] * (2 * LAYERS - 1)


def test_a_graph_may_be_used_twice() -> None:
    plain, moved = tiny_model("INTERNLM2", **KEYS), tiny_model("INTERNLM2", **KEYS)
    moved.offloading = offloading_of(autograd_layers=range(LAYERS))
    for model in (plain, moved):
        loss = forward(model)
        loss.backward(retain_graph=True)
        loss.backward()
    assert_same_bits(gradients(moved), gradients(plain))


def test_a_graph_may_be_dropped_half_used() -> None:
    """The layer before was on its way back: its copies must not land in what was freed."""
    plain, moved = tiny_model("INTERNLM2", **KEYS), tiny_model("INTERNLM2", **KEYS)
    moved.offloading = offloading_of(LateCopyStream(), autograd_layers=range(LAYERS))
    for model in (plain, moved):
        torch.autograd.grad(forward(model), list(model.layers["3"].parameters()))
        forward(model).backward()
    assert_same_bits(gradients(moved), gradients(plain))


@pytest.mark.parametrize("stream", [CopyStream, LateCopyStream])
@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
def test_what_recomputation_keeps_may_move(dtype: str, stream: Any) -> None:
    keys = {**KEYS, "dtype": dtype}
    plain = tiny_model("INTERNLM2", **keys)
    moved = tiny_model("INTERNLM2", checkpoint=0.75, checkpoint_save_policy="attention", **keys)
    moved.offloading = offloading_of(stream(), store_layers=range(3))
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
    moved.offloading = offloading_of(LateCopyStream(), autograd_layers=range(LAYERS), store_layers=range(LAYERS))
    for layer in moved.layers.values():
        layer.store = moved.offloading
    for model in (plain, moved):
        forward(model).backward()
    assert_same_bits(gradients(moved), gradients(plain))
