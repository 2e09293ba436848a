"""The linear layers of experts in float8 on one device; those of the parallel modes run the same kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from internlm.model.ops.float8 import grouped_gemm
from internlm.model.ops.float8.grouped_kernels import Float8GroupedKernels


def float8_grouped_linear(
    x: Tensor, weight: Tensor, counts: Tensor, *, implementation: grouped_gemm.Implementation | None = None
) -> Tensor:
    """`grouped_linear` whose three GEMMs are of float8 tensors.

    Args:
        x: `[M, K]`, sorted by expert. It is kept for backward in float8, with a scale for each row.
        weight: `[E, N, K]`, in the dtype of x.
        counts: int64 `[E]`, rows of each expert, on the device of x; their sum is M.
        implementation: None asks `grouped_gemm.implementation`.

    Returns:
        `[M, N]` in the dtype of x.
    """
    kind = implementation or grouped_gemm.implementation(x.device)
    out: Tensor = _Float8GroupedLinear.apply(x, weight, counts, Float8GroupedKernels(x.dtype, kind))
    return out


class _Float8GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: Tensor, kernels: Float8GroupedKernels) -> Tensor:
        scales = kernels.compute_scales(x, weight)
        saved = kernels.saved_rows(x, scales)
        ctx.kernels = kernels
        ctx.save_for_backward(saved, weight, counts, *scales)
        return kernels.output(saved, weight, counts, scales)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        kernels: Float8GroupedKernels = ctx.kernels
        saved, weight, counts, *scales = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = kernels.input_gradient(grad, weight, counts, scales)
        if ctx.needs_input_grad[1]:
            grad_weight = kernels.weight_gradient(grad, saved, counts, scales)
        return grad_x, grad_weight, None, None
