"""Triton kernels for the sums over the experts of a token: each row is read once and converted in registers.

Imported only where Triton is (`internlm.utils.triton_support`). Shapes as in `expert_order.py`.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton import language as tl

_BLOCK = 1024
"""Columns per program, or per iteration."""


def sum_rows(source: Tensor, rows: Tensor, weights: Tensor | None) -> Tensor:
    """The sum of k rows for each token, in fp32 and in the order of `rows`, rounded once.

    Args:
        source: `[M, h]`, contiguous.
        rows: int64 `[T, k]`, contiguous.
        weights: fp32 `[T, k]`, contiguous, factors of the rows; None: no factors.

    Returns:
        `[T, h]`.
    """
    (num_tokens, top_k), width = rows.shape, source.shape[1]
    out = source.new_empty(num_tokens, width)
    if out.numel():
        _sum_rows[(num_tokens, triton.cdiv(width, _BLOCK))](
            out,
            source,
            rows,
            rows if weights is None else weights,
            width,
            TOP_K=top_k,
            IS_WEIGHTED=weights is not None,
            BLOCK=_BLOCK,
        )
    return out


def weighted_sum_gradients(grad: Tensor, y: Tensor, weights: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of rows and weights of a weighted sum, computed in fp32.

    Args:
        grad: gradient of the sum, `[T, h]`, contiguous.
        y: `[M, h]`, sorted by expert, contiguous.
        weights: fp32 `[T, k]`, contiguous.
        order: int64 `[M]`, contiguous; see `ExpertOrder`.

    Returns:
        (`[M, h]`, fp32 `[T, k]`), zeros for the weights of dropped pairs.
    """
    grad_y, grad_weights = torch.empty_like(y), torch.zeros_like(weights)
    if y.shape[0]:
        _weighted_sum_gradients[(y.shape[0],)](
            grad_y, grad_weights, grad, y, weights, order, y.shape[1], TOP_K=weights.shape[1], BLOCK=_BLOCK
        )
    return grad_y, grad_weights


@triton.jit
def _sum_rows(out, source, rows, weights, width, TOP_K: tl.constexpr, IS_WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = column < width
    total = tl.full((BLOCK,), 0.0, tl.float32)
    for choice in tl.static_range(TOP_K):
        pair = token * TOP_K + choice
        values = tl.load(source + tl.load(rows + pair) * width + column, mask=is_inside, other=0.0).to(tl.float32)
        if IS_WEIGHTED:
            values *= tl.load(weights + pair)
        total += values
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=is_inside)


@triton.jit
def _weighted_sum_gradients(
    grad_y, grad_weights, grad, y, weights, order, width, TOP_K: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    pair = tl.load(order + row)
    token = pair // TOP_K
    weight = tl.load(weights + pair)
    total = tl.full((BLOCK,), 0.0, tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        is_inside = column < width
        own = tl.load(grad + token * width + column, mask=is_inside, other=0.0).to(tl.float32)
        total += own * tl.load(y + row * width + column, mask=is_inside, other=0.0).to(tl.float32)
        tl.store(grad_y + row * width + column, (own * weight).to(grad_y.dtype.element_ty), mask=is_inside)
    tl.store(grad_weights + pair, tl.sum(total))
