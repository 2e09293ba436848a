"""Reference implementations: the formula of every op in plain PyTorch.

They run on any device in any dtype. Nothing is fused, padded or recomputed, and everything except the rounding to
float8 is differentiable by autograd alone. In float64 they are the ground truth of tests, `internlm doctor` and the
checks on a GPU; in 16 bits they show the error of plain code. Arguments and results are those of the ops.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from internlm.model.ops.cross_entropy import IGNORE_INDEX
from internlm.model.ops.float8.scaled_gemm import FORWARD_FORMAT, GRADIENT_FORMAT

_FRACTION_BITS = {torch.float8_e4m3fn: 3, torch.float8_e5m2: 2}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Causal attention with one mask over all scores; memory grows with S x T.

    Args:
        q: `[B, S, H, D]`.
        k, v: `[B, T, K, D]`, T >= S; the queries are the last S positions.
        cu_seqlens: `[n + 1]`, bounds of the documents of a packed row (T = S); None: each row is one document.
        window: maximum number of keys that a query attends to, itself included; None: no limit.
        scale: factor on the scores; None: 1 / sqrt(D).
    """
    return _weighted_values(_scores(q, k, cu_seqlens, window, scale), v)


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    window: int | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`attention`, and the log-sum-exp of each query's scores, `[B, S, H]`."""
    scores = _scores(q, k, cu_seqlens, window, scale)
    return _weighted_values(scores, v), scores.logsumexp(-1).flatten(1, 2).transpose(1, 2)


def _scores(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, window: int | None, scale: float | None) -> Tensor:
    """`[B, K, H / K, S, T]`, -inf where a key is masked."""
    num_queries, num_keys = q.shape[1], k.shape[1]
    keys = torch.arange(num_keys, device=q.device)
    distance = keys[num_keys - num_queries :, None] - keys
    visible = distance >= 0
    if window is not None:
        visible = visible & (distance < window)
    if cu_seqlens is not None:
        document = torch.bucketize(keys, cu_seqlens[1:], right=True)
        visible = visible & (document[:, None] == document)
    grouped = q.unflatten(2, (k.shape[2], -1))
    scores = torch.einsum("bskgd,btkd->bkgst", grouped, k) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    return scores.masked_fill(~visible, -math.inf)


def _weighted_values(scores: Tensor, v: Tensor) -> Tensor:
    """Scores `[B, K, H / K, S, T]` and values `[B, T, K, D]` -> `[B, S, H, D]`."""
    return torch.einsum("bkgst,btkd->bskgd", scores.softmax(-1), v).flatten(2, 3)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, unit_offset: bool = False) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight`; with `unit_offset`, `1 + weight` instead of `weight`."""
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return normed * (1 + weight if unit_offset else weight)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """`(x - mean) / sqrt(variance + eps) * weight + bias`."""
    centered = x - x.mean(-1, keepdim=True)
    scaled = centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps) * weight
    return scaled if bias is None else scaled + bias


def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`silu(gate) * up`, or `gelu(gate) * up` with the tanh approximation."""
    if activation == "silu":
        return gate * torch.sigmoid(gate) * up
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate.pow(3))
    return 0.5 * gate * (1 + torch.tanh(inner)) * up


def rotary(x: Tensor, angles: Tensor, *, interleaved: bool) -> Tensor:
    """`x` `[B, S, N, D]` with its pairs rotated by `angles` `[B, S, D/2]`."""
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    cos, sin = angles.cos().unsqueeze(2).to(x.dtype), angles.sin().unsqueeze(2).to(x.dtype)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return torch.stack(rotated, -1).flatten(-2) if interleaved else torch.cat(rotated, -1)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss_coeff: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """Sum of the losses of valid tokens, from full logits."""
    logits = hidden @ weight.t()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing, ignore_index=IGNORE_INDEX)
    return loss + z_loss_coeff * logits.logsumexp(-1)[labels != IGNORE_INDEX].square().sum()


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """`x_r weight_e^T` for each row r and its expert e; the first `counts[0]` rows are those of expert 0, and so on."""
    groups = x.split(counts.tolist())
    return torch.cat([rows @ own.t() for rows, own in zip(groups, weight, strict=True)])


def float8_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight^T`, both rounded to e4m3; in backward, the gradient of the output is rounded to e5m2."""
    result: Tensor = _RoundedLinear.apply(x, weight)
    return result


def float8_grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """`grouped_linear` with rows and weights rounded to e4m3, and the gradient of the output to e5m2.

    Each row has a scale, and the weight of each expert. So has each row of the gradient, where it is for that of x. For
    that of the weight, it is multiplied with the scale of the row of x, and the rows of an expert have one scale.
    """
    result: Tensor = _RoundedGroupedLinear.apply(x, weight, counts)
    return result


def rounded_to_float8(x: Tensor, format: torch.dtype) -> Tensor:
    """Round to a float8 format, scaled by the smallest power of two with which the largest value does not overflow.

    Computed in float64, where each step is exact. The result has the dtype of x, which represents it exactly.

    Args:
        x: may be empty.
        format: a float8 dtype.
    """
    wide, scale = x.double(), float8_scale(x, format)
    scaled = wide / scale
    # Twice the largest power of two that does not exceed the number.
    above = torch.where(scaled == 0, 0.0, scaled / torch.frexp(scaled).mantissa)
    # Subnormal numbers have the spacing of the smallest normal ones.
    step = (above / 2).clamp(min=torch.finfo(format).smallest_normal) * 2.0 ** -_FRACTION_BITS[format]
    return ((scaled / step).round() * step * scale).to(x.dtype)


def float8_scale(x: Tensor, format: torch.dtype) -> float:
    """The smallest power of two by which x can be divided without overflow in a float8 format; 1 if all is zero."""
    largest = x.double().abs().max().item() if x.numel() else 0.0
    return 2.0 ** math.ceil(math.log2(largest / torch.finfo(format).max)) if largest else 1.0


class _RoundedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x8, weight8 = (rounded_to_float8(tensor, FORWARD_FORMAT) for tensor in (x, weight))
        ctx.save_for_backward(x8, weight8)
        return x8 @ weight8.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x8, weight8 = ctx.saved_tensors
        grad8 = rounded_to_float8(grad, GRADIENT_FORMAT)
        return grad8 @ weight8, grad8.flatten(0, -2).t() @ x8.flatten(0, -2)


class _RoundedGroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        x8, weight8 = (_each_rounded_to_float8(tensor, FORWARD_FORMAT) for tensor in (x, weight))
        scales = x.new_tensor([float8_scale(row, FORWARD_FORMAT) for row in x]).unsqueeze(-1)
        ctx.save_for_backward(x8, scales, weight8, counts)
        return grouped_linear(x8, weight8, counts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x8, scales, weight8, counts = ctx.saved_tensors
        sizes = counts.tolist()
        pairs = zip((grad * scales).split(sizes), (x8 / scales).split(sizes), strict=True)
        grad_weight = [rounded_to_float8(own, GRADIENT_FORMAT).t() @ rows for own, rows in pairs]
        grad8 = _each_rounded_to_float8(grad, GRADIENT_FORMAT)
        return grouped_linear(grad8, weight8.transpose(1, 2), counts), torch.stack(grad_weight), None


def _each_rounded_to_float8(x: Tensor, format: torch.dtype) -> Tensor:
    """Each element along the first dimension, with a scale of its own."""
    return torch.stack([rounded_to_float8(own, format) for own in x]) if len(x) else x
