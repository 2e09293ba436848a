"""Biases of experts: each row gets that of its expert."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from internlm.model.ops.grouped_linear import weight_gradient

_COLUMNS = 8
"""Width of the ones whose grouped GEMM sums rows: a multiple of what PyTorch's kernel requires."""


def add_expert_bias(rows: Tensor, bias: Tensor, counts: Tensor) -> Tensor:
    """`rows_r + bias_e` for each row r and its expert e; nothing waits for the device.

    Args:
        rows: `[M, N]`, sorted by expert.
        bias: `[E, N]`.
        counts: int64 `[E]`, rows of each expert; their sum is M.

    Returns:
        `[M, N]`. The gradient of the bias is summed in a fixed order.
    """
    result: Tensor = _AddExpertBias.apply(rows, bias, counts)
    return result


class _AddExpertBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, bias: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(counts)
        ctx.dtype = bias.dtype
        return rows + bias.repeat_interleave(counts, dim=0, output_size=rows.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (counts,) = ctx.saved_tensors
        sums = weight_gradient(grad, grad.new_ones(grad.shape[0], _COLUMNS), counts)[..., 0]
        return grad, sums.to(ctx.dtype), None
