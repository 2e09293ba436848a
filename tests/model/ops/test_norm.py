"""Norms against PyTorch's own, in float64 for the gradients and at 16 bits for the rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from internlm.model.ops.norm import layer_norm, rms_norm


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _reference(x: Tensor, weight: Tensor, unit_offset: bool) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight + 1 if unit_offset else weight, 1e-3)


@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 9), (0, 4)])
def test_rms_norm(shape: tuple[int, ...], unit_offset: bool) -> None:
    x, weight = _draw(*shape).requires_grad_(), _draw(shape[-1], seed=1).requires_grad_()
    ours, theirs = rms_norm(x, weight, 1e-3, unit_offset=unit_offset), _reference(x, weight, unit_offset)
    torch.testing.assert_close(ours, theirs)
    grad = _draw(*shape, seed=2)
    for mine, reference in zip(
        torch.autograd.grad(ours, (x, weight), grad), torch.autograd.grad(theirs, (x, weight), grad), strict=True
    ):
        torch.testing.assert_close(mine, reference)


def test_gradient_of_rms_norm() -> None:
    inputs = (_draw(4, 5).requires_grad_(), _draw(5, seed=1).requires_grad_())
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-3), inputs)
    # A view with strides of its own, and a gradient for one input alone.
    assert torch.autograd.gradcheck(lambda x: rms_norm(x.t(), inputs[1].detach()[:4], 1e-3), inputs[:1])


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_bf16_is_rounded_once(weight_dtype: torch.dtype) -> None:
    """The arithmetic is fp32, so the result is the exact one rounded to 8 bits (half a unit, and fp32's own error)."""
    x, weight = _draw(40, 64).bfloat16().requires_grad_(), _draw(64, seed=1).to(weight_dtype).requires_grad_()
    exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    ours, exact = rms_norm(x, weight, 1e-3), _reference(exact_x, exact_weight, False)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.double(), exact, rtol=2**-8, atol=1e-6)
    grad = _draw(40, 64, seed=2).bfloat16()
    mine = torch.autograd.grad(ours, (x, weight), grad)
    reference = torch.autograd.grad(exact, (exact_x, exact_weight), grad.double())
    assert mine[0].dtype == torch.bfloat16 and mine[1].dtype == weight_dtype
    torch.testing.assert_close(mine[0].double(), reference[0], rtol=2**-8, atol=1e-5)
    torch.testing.assert_close(mine[1].double(), reference[1], rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_layer_norm(weight_dtype: torch.dtype) -> None:
    x, weight, bias = _draw(6, 16).bfloat16(), _draw(16, seed=1).to(weight_dtype), _draw(16, seed=2).to(weight_dtype)
    ours = layer_norm(x, weight, bias, 1e-3)
    assert ours.dtype == torch.bfloat16
    exact = F.layer_norm(x.double(), (16,), weight.double(), bias.double(), 1e-3)
    torch.testing.assert_close(ours.double(), exact, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_layer_norm_are_summed_over_tokens_in_fp32(dtype: torch.dtype) -> None:
    """Each is the exact sum, rounded once: by half a unit of its last place at most, in the mean over entries less."""
    x, weight, bias = _draw(3000, 16).to(dtype), _draw(16, seed=1).to(dtype), _draw(16, seed=2).to(dtype)
    grad = _draw(3000, 16, seed=3).to(dtype)

    def gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(layer_norm(*leaves, 1e-3), leaves, grad.to(inputs[0].dtype))

    for mine, exact in zip(
        gradients(x, weight, bias), gradients(x.double(), weight.double(), bias.double()), strict=True
    ):
        assert (mine.double() - exact).norm() < torch.finfo(dtype).eps / 2 * exact.norm()
