"""Rotary position embedding (https://arxiv.org/abs/2104.09864): turning pairs of channels by position-dependent angles.

A pair is channels (i, i + D/2) in the half-split layout, (2i, 2i + 1) in the interleaved one. The angles come from
`internlm/model/modules/rotary.py`; this module only turns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from internlm.model.ops.registry import Choice, register_op


@register_op("rotary")
def _choose(device: torch.device) -> Choice:
    return Choice("own autograd function", "turns back by the same tables in backward; keeps no activations")


@dataclass(frozen=True)
class RotaryTables:
    """Cosines and sines of one forward pass, shared by its layers.

    Attributes:
        cos, sin: `[B, S, 1, D/2]`; their dtype is the dtype of the arithmetic (fp32, or that of the model).
        interleaved: which channels make a pair.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool


def apply_rotary(x: Tensor, tables: RotaryTables) -> Tensor:
    """Turn `x` `[B, S, N, D]`; the result has its dtype and is contiguous."""
    result: Tensor = _Rotate.apply(x, tables.cos, tables.sin, tables.interleaved)
    return result


def split_rotary(qkv: Tensor, tables: RotaryTables) -> tuple[Tensor, Tensor, Tensor]:
    """Split a fused projection and turn its queries and keys.

    Args:
        qkv: `[B, S, K, g + 2, D]`: for each of K key-value heads, its g query heads, its key, its value.

    Returns:
        q `[B, S, K g, D]`, k `[B, S, K, D]`, v `[B, S, K, D]`. As one function it spares the backward pass the three
        zero-filled buffers, and their sum, that slicing would cost.
    """
    q, k, v = _SplitRotate.apply(qkv, tables.cos, tables.sin, tables.interleaved)
    return q, k, v


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, out: Tensor) -> None:
    """Write x, turned, to `out`. Both are `[B, S, ..., D]`; cos and sin broadcast."""
    dtype = torch.promote_types(cos.dtype, x.dtype)
    first, second = _pairs(x.to(dtype), interleaved)
    out_first, out_second = _pairs(out, interleaved)
    out_first.copy_((first * cos).addcmul_(second, sin, value=-1))
    out_second.copy_((second * cos).addcmul_(first, sin))


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _rotate(x, cos, sin, interleaved, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        out = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
        _rotate(grad, cos, -sin, ctx.interleaved, out)
        return out, None, None, None


class _SplitRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        ctx.shape = qkv.shape
        batch, length, kv_heads, width, head_dim = qkv.shape
        q = qkv.new_empty(batch, length, kv_heads, width - 2, head_dim)
        k = qkv.new_empty(batch, length, kv_heads, head_dim)
        _rotate(qkv[:, :, :, :-2], cos.unsqueeze(2), sin.unsqueeze(2), interleaved, q)
        _rotate(qkv[:, :, :, -2], cos, sin, interleaved, k)
        return q.view(batch, length, -1, head_dim), k, qkv[:, :, :, -1].clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        grad = grad_q.new_empty(ctx.shape)
        queries = grad[:, :, :, :-2]
        _rotate(grad_q.reshape(queries.shape), cos.unsqueeze(2), -sin.unsqueeze(2), ctx.interleaved, queries)
        _rotate(grad_k, cos, -sin, ctx.interleaved, grad[:, :, :, -2])
        grad[:, :, :, -1].copy_(grad_v)
        return grad, None, None, None
