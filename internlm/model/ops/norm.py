"""Normalization over the last dimension: RMSNorm (https://arxiv.org/abs/1910.07467) and LayerNorm, computed in fp32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from internlm.model.ops import liger_kernels as liger
from internlm.model.ops.implementation_choice import Choice


def rms_norm_choice(device: torch.device, fused_kernels: str = "auto", *, compiled: bool = False) -> Choice:
    """The implementation of `rms_norm`."""
    return liger.choice(
        device, fused_kernels, compiled=compiled, name="LigerRMSNormFunction", otherwise=_own_rms_norm_choice(device)
    )


def _own_rms_norm_choice(device: torch.device) -> Choice:
    if device.type == "cpu":
        return Choice("own autograd function", "PyTorch's rms_norm is a chain of separate kernels on CPU")
    return Choice("torch.nn.functional.rms_norm", f"a fused kernel exists on {device.type}")


def layer_norm_choice(device: torch.device) -> Choice:
    """The implementation of `layer_norm`."""
    return Choice("torch.nn.functional.layer_norm", "a fused kernel exists on every device")


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, unit_offset: bool = False, fused_kernels: str = "auto"
) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension.

    Args:
        x: `[..., h]`, any floating-point dtype; computed in fp32, or in float64 if x or weight is.
        weight: `[h]`.
        eps: added to the mean square.
        unit_offset: scale by `1 + weight` (Gemma).
        fused_kernels: the config's `model.fused_kernels`.

    Returns:
        `[..., h]` in the dtype of x.
    """
    dtype = _compute_dtype(x, weight)
    if torch.compiler.is_compiling():
        # As plain operators, which the compiler fuses with their neighbors.
        wide = x.to(dtype)
        wide_weight = weight.to(dtype) + 1 if unit_offset else weight.to(dtype)
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * wide_weight).to(x.dtype)
    if liger.serves(x, fused_kernels):
        return liger.rms_norm(x, weight, eps, unit_offset=unit_offset)
    if x.device.type == "cpu":
        result: Tensor = _RMSNorm.apply(x, weight, eps, unit_offset)
        return result
    scale = weight.to(dtype) + 1 if unit_offset else weight
    if x.dtype == scale.dtype:
        return F.rms_norm(x, (x.shape[-1],), scale, eps)
    return F.rms_norm(x.to(dtype), (x.shape[-1],), scale.to(dtype), eps).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last dimension; arguments and result as for `rms_norm`, with a bias `[h]`."""
    # PyTorch's 16-bit CPU kernel also sums the gradients of weight and bias over tokens in 16 bits.
    sums_in_16_bits = x.device.type == "cpu" and x.dtype.itemsize == 2
    if x.dtype == weight.dtype and not sums_in_16_bits:
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    dtype = _compute_dtype(x, weight)
    wide_bias = None if bias is None else bias.to(dtype)
    return F.layer_norm(x.to(dtype), (x.shape[-1],), weight.to(dtype), wide_bias, eps).to(x.dtype)


def _compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)


class _RMSNorm(torch.autograd.Function):
    """RMSNorm that saves the input and one number per row for backward.

    With t = grad * x * rstd, the weight's gradient is the sum of t over rows, and the input's needs the matrix-vector
    product of t with the scale.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> Tensor:
        dtype = _compute_dtype(x, weight)
        rows = x.reshape(-1, x.shape[-1])
        mean_square = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=dtype).square_().div_(rows.shape[-1])
        rstd = mean_square.add_(eps).rsqrt_()
        scale = weight.to(dtype) + 1 if unit_offset else weight.to(dtype)
        # Not a view of `rows`: FSDP warns about outputs that are views.
        out = torch.mul(x, rstd.view(*x.shape[:-1], 1)).mul_(scale)
        ctx.save_for_backward(x, weight, rstd)
        ctx.unit_offset = unit_offset
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, rstd = ctx.saved_tensors
        dtype = rstd.dtype
        normed = torch.mul(x.reshape(-1, x.shape[-1]), rstd)
        wide_grad = grad.reshape(normed.shape).to(dtype)
        scale = weight.to(dtype) + 1 if ctx.unit_offset else weight.to(dtype)
        product = wide_grad * normed
        grad_weight = product.sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            projection = torch.mv(product, scale).div_(-scale.shape[0]).unsqueeze_(-1)
            torch.mul(wide_grad, scale, out=product)
            grad_x = product.addcmul_(normed, projection).mul_(rstd).to(x.dtype).view(x.shape)
        return grad_x, grad_weight, None, None
