"""The order of tokens by expert: rows go to their experts, and results come back as a weighted sum.

Sums over the k experts of a token are gathers in a fixed order, never atomic additions, so two runs give equal bits.

Shapes: T tokens, k experts of each, E experts, h the width, M rows sorted by expert: T * k without the dropped ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from internlm.model.ops.cpu.native import has_native_ops
from internlm.utils.triton_support import why_no_triton

_BLOCK = {"cpu": 1 << 18}
"""Device type -> elements that `combine` converts to fp32 at once: 1 MiB on a CPU, which fits into a cache."""

_OTHER_BLOCK = 1 << 26
"""The same on other devices: 256 MiB, to limit temporary memory."""

_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class ExpertOrder:
    """The rows of all (token, expert) pairs that are not dropped, sorted by expert, then by token.

    Attributes:
        order: int64 `[M]`; row r is pair `order[r]`, which is token `order[r] // k`.
        inverse: int64 `[T * k]`; pair p is row `inverse[p]`, or any row if it is dropped.
        counts: int64 `[E]`, rows of each expert.
        top_k: k.
        kept: bool `[T, k]`, false for dropped pairs; None: all are kept.
    """

    order: Tensor
    inverse: Tensor
    counts: Tensor
    top_k: int
    kept: Tensor | None = None

    @classmethod
    def of(cls, experts: Tensor, num_experts: int, kept: Tensor | None = None) -> ExpertOrder:
        """The order for the chosen experts, int64 `[T, k]`.

        Does not wait for the device, unless pairs may be dropped: then it waits for their number.
        """
        if kept is not None:
            experts = experts.masked_fill(~kept, num_experts)
        experts_by_row, order = experts.flatten().sort(stable=True)
        rows = torch.arange(order.shape[0], device=order.device)
        inverse = torch.empty_like(order).scatter_(0, order, rows)
        # bincount would wait for the device to find the largest value.
        bounds = torch.searchsorted(experts_by_row, torch.arange(num_experts + 1, device=order.device))
        if kept is not None:
            num_rows = int(bounds[-1])
            order, inverse = order[:num_rows], inverse.clamp(max=max(0, num_rows - 1))
        return cls(order, inverse, bounds.diff(), experts.shape[1], kept)


def dispatch(x: Tensor, order: ExpertOrder) -> Tensor:
    """The rows of the experts: row r is token `order.order[r] // k`.

    The gradient of a token is the sum over its k rows, in fp32 (float64 for float64) and rounded once.

    Args:
        x: `[T, h]`.
        order: of the T tokens.

    Returns:
        `[M, h]`.
    """
    out: Tensor = _Dispatch.apply(x, order.order // order.top_k, order.inverse.view(-1, order.top_k), order.kept)
    return out


def permute(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Rows in another order: row r of the result is row `order[r]`.

    Args:
        x: `[M, h]`.
        order, inverse: int64 `[M]`, a permutation and its inverse.
    """
    out: Tensor = _Dispatch.apply(x, order, inverse.unsqueeze(1), None)
    return out


def combine(y: Tensor, weights: Tensor, order: ExpertOrder) -> Tensor:
    """The sum of each token's k rows, weighted, in fp32 (float64 for float64) and rounded once.

    Args:
        y: `[M, h]`, sorted by expert.
        weights: fp32 `[T, k]`, zeros for dropped pairs.
        order: of the T tokens.

    Returns:
        `[T, h]` in the dtype of y.
    """
    out: Tensor = _combine(y, weights, order.order, order.inverse)
    return out


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor, rows: Tensor, kept: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, kept)
        return x.index_select(0, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        rows, kept = ctx.saved_tensors
        if kept is None:
            return _sum_rows(grad, rows) if grad.is_cuda else _summed(grad, rows), None, None, None
        if len(grad) == 0:
            return grad.new_zeros(len(rows), grad.shape[1]), None, None, None
        return _summed(grad, rows, kept.to(grad.dtype)), None, None, None


def _summed(grad: Tensor, rows: Tensor, factors: Tensor | None = None) -> Tensor:
    return F.embedding_bag(rows, grad.contiguous(), mode="sum", per_sample_weights=factors)


@torch.library.custom_op(
    "internlm::sum_rows", mutates_args=(), device_types="cuda", schema="(Tensor grad, Tensor rows) -> Tensor"
)
def _sum_rows(grad: Tensor, rows: Tensor) -> Tensor:
    """For each token the sum of its k rows; an operator, as a compiler cannot look into the kernel."""
    if not _has_kernels(grad):
        return _summed(grad, rows)
    from internlm.model.moe.expert_order_kernels import sum_rows

    return sum_rows(grad.contiguous(), rows.contiguous(), None)


@_sum_rows.register_fake
def _(grad: Tensor, rows: Tensor) -> Tensor:
    return grad.new_empty(rows.shape[0], grad.shape[1])


def _has_kernels(x: Tensor) -> bool:
    """Whether own Triton kernels sum rows of this tensor: others convert them in passes of their own."""
    return x.is_cuda and x.dtype in _KERNEL_DTYPES and why_no_triton(x.device) is None


def _has_native_sums(x: Tensor) -> bool:
    """Whether own C++ ops sum rows of this tensor."""
    return x.is_cpu and x.dtype == torch.bfloat16 and has_native_ops()


@torch.library.custom_op(
    "internlm::combine", mutates_args=(), schema="(Tensor y, Tensor weights, Tensor order, Tensor inverse) -> Tensor"
)
def _combine(y: Tensor, weights: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    num_tokens, top_k = weights.shape
    if len(y) == 0:
        return y.new_zeros(num_tokens, y.shape[1])
    wide = torch.promote_types(y.dtype, torch.float32)
    rows, weights, y = inverse.view(num_tokens, top_k), weights.to(wide), y.contiguous()
    if _has_kernels(y):
        from internlm.model.moe.expert_order_kernels import sum_rows

        return sum_rows(y, rows, weights.contiguous())
    if _has_native_sums(y):
        out: Tensor = torch.ops.internlm_native.sum_rows(y, rows.contiguous(), weights.contiguous())
        return out
    if y.dtype == wide:
        return F.embedding_bag(rows, y, mode="sum", per_sample_weights=weights)
    out = y.new_empty(num_tokens, y.shape[1])
    # embedding_bag needs rows and weights in one dtype: blocks of rows are gathered by token and converted.
    for tokens in _blocks(num_tokens, top_k * y.shape[1], y.device):
        own = rows[tokens]
        own_y = y.index_select(0, own.flatten()).to(wide)
        in_order = torch.arange(own.numel(), device=y.device).view(own.shape)
        out[tokens] = F.embedding_bag(in_order, own_y, mode="sum", per_sample_weights=weights[tokens])
    return out


@_combine.register_fake
def _(y: Tensor, weights: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    return y.new_empty(weights.shape[0], y.shape[1])


@torch.library.custom_op(
    "internlm::combine_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor y, Tensor weights, Tensor order) -> (Tensor, Tensor)",
)
def _combine_backward(grad: Tensor, y: Tensor, weights: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `y` and `weights`, row by row; zeros for dropped pairs, whose weights may be renormalized."""
    if len(y) == 0:
        return torch.empty_like(y), torch.zeros_like(weights)
    if _has_kernels(y):
        from internlm.model.moe.expert_order_kernels import weighted_sum_gradients

        grad_y, grad_weights = weighted_sum_gradients(
            grad.contiguous(), y.contiguous(), weights.float().contiguous(), order
        )
        return grad_y, grad_weights.to(weights.dtype)
    if _has_native_sums(y):
        grad_y, grad_weights = torch.ops.internlm_native.sum_rows_gradients(
            grad.contiguous(), y.contiguous(), weights.float().contiguous(), order.contiguous()
        )
        return grad_y, grad_weights.to(weights.dtype)
    wide = torch.promote_types(y.dtype, torch.float32)
    tokens, weight_of_row = order // weights.shape[1], weights.flatten()[order].to(wide)
    grad_y, grad_weights = y.new_empty(y.shape), y.new_zeros(weights.numel(), dtype=wide)
    for rows in _blocks(y.shape[0], y.shape[1], y.device):
        own = grad.index_select(0, tokens[rows]).to(wide)
        grad_weights.scatter_(0, order[rows], (own * y[rows]).sum(-1))
        grad_y[rows] = own.mul_(weight_of_row[rows].unsqueeze(-1))
    return grad_y, grad_weights.view(weights.shape).to(weights.dtype)


@_combine_backward.register_fake
def _(grad: Tensor, y: Tensor, weights: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), weights.new_empty(weights.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    y, weights, order, _ = inputs
    ctx.save_for_backward(y, weights, order)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    return *_combine_backward(grad, *ctx.saved_tensors), None, None


_combine.register_autograd(_differentiate, setup_context=_save_for_backward)


def _blocks(length: int, width: int, device: torch.device) -> list[slice]:
    """Slices of `length` rows of `width` elements, each within the size of a block; at least one row."""
    step = max(1, _BLOCK.get(device.type, _OTHER_BLOCK) // max(1, width))
    return [slice(start, start + step) for start in range(0, length, step)]
