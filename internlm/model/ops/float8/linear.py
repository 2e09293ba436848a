"""A linear layer in float8 on one device; layers of the parallel modes run the same kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from internlm.model.ops.float8 import scaled_gemm
from internlm.model.ops.float8.kernels import Float8Kernels


def float8_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, on_hardware: bool | None = None) -> Tensor:
    """`F.linear` whose three products (output, gradient of the input, gradient of the weight) are of float8 tensors.

    Args:
        x: `[..., in]`. It is kept for backward in float8.
        weight: `[out, in]` in the dtype of x; also a `Float8Weight`, which is multiplied as it is.
        bias: `[out]`, added in the dtype of x.
        on_hardware: None asks `runs_on_hardware`.

    Returns:
        `[..., out]` in the dtype of x.
    """
    on_hardware = scaled_gemm.runs_on_hardware(x.device) if on_hardware is None else on_hardware
    out: Tensor = _Float8Linear.apply(x, weight, Float8Kernels(x.dtype, on_hardware=on_hardware))
    return out if bias is None else out + bias


class _Float8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kernels: Float8Kernels) -> Tensor:
        operand = scaled_gemm.as_scaled(weight)
        scales = kernels.compute_scales(x, [[operand]])
        x8 = kernels.quantize_input(x, scales)
        ctx.kernels = kernels
        ctx.save_for_backward(kernels.saved_input(x8), weight, scales)
        return kernels.output(x8, kernels.quantize_weight(operand, scales, 0), None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        kernels: Float8Kernels = ctx.kernels
        saved, weight, scales = ctx.saved_tensors
        ((grad8,),) = kernels.quantize_gradients([[grad]])
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = kernels.input_gradient(grad8, kernels.quantize_weight(scaled_gemm.as_scaled(weight), scales, 0))
        if ctx.needs_input_grad[1]:
            grad_weight = kernels.weight_gradient(grad8, kernels.restore_input(saved, scales))
        return grad_x, grad_weight, None
