"""Offload and recomputation on a GPU: less memory, no other bits, no host that waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.model import tiny_model
from torch import Tensor, nn

from internlm.model.offload import Offloading
from internlm.model.ops.attention.causal_attention import VarlenMetadata
from internlm.utils.copy_stream import CudaCopyStream

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LAYERS, TOKENS = 8, 4096
SHAPE = {
    "num_layers": LAYERS, "hidden_size": 1024, "num_attention_heads": 8, "num_kv_attention_heads": 4,
    "intermediate_size": 2816, "dtype": "torch.bfloat16",
}  # fmt: skip


def build(**changes: Any) -> Any:
    return tiny_model("INTERNLM2", **{**SHAPE, **changes}).to("cuda")


def forward(model: nn.Module, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(97, (1, TOKENS), generator=generator).cuda()
    lengths = (TOKENS // 2, TOKENS // 4, TOKENS // 4)
    positions = torch.cat([torch.arange(length) for length in lengths])[None].cuda()
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32).cuda()
    hidden = model(ids, positions, VarlenMetadata.of(lengths, cu_seqlens))
    return hidden.float().square().mean()


def gradients(model: nn.Module, passes: int = 3) -> dict[str, Tensor]:
    for number in range(passes):
        forward(model, number).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def bytes_after_forward(model: nn.Module) -> int:
    """What a forward pass leaves on the device, once all that was started has ended."""
    gradients(model, 1)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    loss = forward(model)
    torch.cuda.synchronize()
    after = torch.cuda.memory_allocated()
    del loss
    return after - before


@pytest.fixture(autouse=True)
def _same_kernels() -> Any:
    """Attention's backward pass adds up in any order otherwise; then two runs of the same model differ as well."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], again: dict[str, Tensor]) -> None:
    """Equal where two runs without the feature are; elsewhere no further apart than four times their difference."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        noise = (again[name].float() - gradient.float()).norm()
        assert (found[name].float() - gradient.float()).norm() <= 4 * noise, name


@pytest.mark.parametrize(
    "recomputing", [{}, {"checkpoint": 0.5}, {"checkpoint": 1.0, "checkpoint_save_policy": "matmuls"}]
)
def test_offload_changes_no_bit(recomputing: dict[str, Any]) -> None:
    expected, again = gradients(build()), gradients(build())
    model = build(**recomputing)
    model.offloading = Offloading(CudaCopyStream(torch.device("cuda")), autograd_layers=range(LAYERS))
    assert_same(gradients(model), expected, again)


def test_kept_outputs_may_move() -> None:
    expected, again = gradients(build()), gradients(build())
    model = build(checkpoint=1.0, checkpoint_save_policy="attention")
    model.offloading = Offloading(CudaCopyStream(torch.device("cuda")), store_layers=range(LAYERS))
    for layer in model.layers.values():
        layer.store = model.offloading
    assert_same(gradients(model), expected, again)


def test_memory_falls_with_what_is_not_kept() -> None:
    plain = bytes_after_forward(build())
    kept = [
        bytes_after_forward(build(checkpoint=1.0, checkpoint_save_policy=k))
        for k in ("matmuls", "attention", "nothing")
    ]
    assert plain > kept[0] > kept[1] > kept[2]
    offloaded = build()
    offloaded.offloading = Offloading(CudaCopyStream(torch.device("cuda")), autograd_layers=range(LAYERS))
    # The last layer stays until the next one ends; small tensors stay too.
    assert bytes_after_forward(offloaded) < plain * 2 / LAYERS


def test_the_host_does_not_wait() -> None:
    model = build()
    model.offloading = Offloading(CudaCopyStream(torch.device("cuda")), autograd_layers=range(LAYERS))
    # Pinned memory is made in the first pass.
    gradients(model, 1)
    loss = forward(model)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
