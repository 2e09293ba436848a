"""Triton kernels for the passes of a step over all gradients and weights, which run at the memory's bandwidth.

PyTorch's kernels for these passes take about twice the time: those of mixed dtypes convert element by element, and the
fused AdamW also writes the divided gradients back. Imported only where Triton is (`internlm.utils.triton_support`).
"""

from __future__ import annotations

import triton
from torch import Tensor
from triton import language as tl

_BLOCK = 1024
"""Elements per program."""


def accumulate(target: Tensor, source: Tensor, *, adds: bool) -> None:
    """Add `source` to `target`, or copy it; in fp32, rounded to the dtype of `target`.

    Args:
        target, source: contiguous and of one shape; each fp32, bf16 or fp16.
        adds: add; otherwise copy.
    """
    numel = target.numel()
    if numel:
        _accumulate[(triton.cdiv(numel, _BLOCK),)](target, source, numel, ADDS=adds, BLOCK=_BLOCK)


def adamw(
    weights: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    rounded: Tensor | None,
    *,
    corrections: Tensor,
    divisor: Tensor,
    skipped: Tensor,
    lr: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """AdamW in fp32, in one pass. All tensors are flat and contiguous.

    Args:
        weights, exp_avg, exp_avg_sq: fp32, updated in place.
        gradient: in any dtype, unchanged.
        rounded: receives the updated weights in its dtype; None: nothing does.
        corrections: fp32 `[2]`, 1 - beta1^t and sqrt(1 - beta2^t) in update t.
        divisor: scalar fp32; divides the gradient.
        skipped: scalar fp32; with 1.0 nothing is written.
        lr, weight_decay, beta1, beta2, eps: see `AdamW`.
    """
    numel = weights.numel()
    _adamw[(triton.cdiv(numel, _BLOCK),)](
        weights,
        gradient,
        exp_avg,
        exp_avg_sq,
        weights if rounded is None else rounded,
        corrections,
        divisor,
        skipped,
        lr,
        lr * weight_decay,
        1 - beta1,
        1 - beta2,
        eps,
        numel,
        ROUNDS=rounded is not None,
        BLOCK=_BLOCK,
    )


@triton.jit
def _accumulate(target, source, numel, ADDS: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_inside = index < numel
    values = tl.load(source + index, mask=is_inside).to(tl.float32)
    if ADDS:
        values += tl.load(target + index, mask=is_inside).to(tl.float32)
    tl.store(target + index, values.to(target.dtype.element_ty), mask=is_inside)


@triton.jit(do_not_specialize=["lr", "decay", "rate1", "rate2", "eps"])
def _adamw(
    weights,
    gradient,
    exp_avg,
    exp_avg_sq,
    rounded,
    corrections,
    divisor,
    skipped,
    lr,
    decay,
    rate1,
    rate2,
    eps,
    numel,
    ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if tl.load(skipped) == 0.0:
        index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        is_inside = index < numel
        weight = tl.load(weights + index, mask=is_inside)
        mean = tl.load(exp_avg + index, mask=is_inside)
        square = tl.load(exp_avg_sq + index, mask=is_inside)
        grad = tl.math.div_rn(tl.load(gradient + index, mask=is_inside).to(tl.float32), tl.load(divisor))
        # Each value moves by a small term, which is rounded before: a factor near 1 would round the value twice.
        weight -= decay * weight
        mean += rate1 * (grad - mean)
        square += rate2 * (grad * grad - square)
        size = tl.math.div_rn(tl.math.sqrt_rn(square), tl.load(corrections + 1)) + eps
        weight -= tl.math.div_rn(lr, tl.load(corrections)) * tl.math.div_rn(mean, size)
        tl.store(weights + index, weight, mask=is_inside)
        tl.store(exp_avg + index, mean, mask=is_inside)
        tl.store(exp_avg_sq + index, square, mask=is_inside)
        if ROUNDS:
            tl.store(rounded + index, weight.to(rounded.dtype.element_ty), mask=is_inside)
