"""Causal attention for 16-bit tensors on CPU, as batched matrix products over blocks of queries.

PyTorch's CPU flash kernel does its 16-bit backward pass in small tiles and takes about twice as long. Here a block of
queries meets all its keys in one product, which the matrix units like; a block's scores are gone before those of the
next are made, and the backward pass makes them again. Memory beyond the inputs: B x H x block x S scores.

The scores are rounded to the 16-bit type before the softmax (itself fp32 inside), as in any attention that is written
as two matrix products; the probabilities are rounded in either kernel.

Shapes: B sequences, S tokens, K key-value heads, g query heads for each of them, D head dimension.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_BLOCK = 128
"""Queries a block: smaller blocks waste less on masked keys, larger ones make better matrix products."""


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float | None) -> Tensor:
    """Causal attention of equally long sequences.

    Args:
        q: `[B, S, K g, D]`.
        k, v: `[B, S, K, D]`.
        window: keys that a query sees at most, itself included; None: all before it.
        scale: factor of the scores; None: 1 / sqrt(D).

    Returns:
        `[B, S, K g, D]`.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    result: Tensor = _BlockedAttention.apply(q, k, v, window, scale)
    return result


def _by_head(x: Tensor, kv_heads: int) -> Tensor:
    """`[B, S, K g, D]` -> view `[B, K, g, S, D]`."""
    return x.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)


def _keys_of(start: int, stop: int, window: int | None) -> slice:
    """The keys that some query of [start, stop) sees."""
    return slice(0 if window is None else max(0, start - window + 1), stop)


def _probabilities(q: Tensor, k: Tensor, rows: int, window: int | None, scale: float) -> Tensor:
    """Softmax of a block's scores: `[B K, g rows, T]` for queries `[B K, g rows, D]` and keys `[B K, T, D]`. The last
    key is level with the last row."""
    num_keys = k.shape[1]
    everywhere = torch.ones(rows, num_keys, dtype=torch.bool, device=q.device)
    hidden = everywhere.triu(num_keys - rows + 1)
    if window is not None:
        hidden |= everywhere.tril(num_keys - rows - window)
    bias = torch.zeros(rows, num_keys, dtype=q.dtype, device=q.device).masked_fill_(hidden, -math.inf)
    bias = bias.repeat(q.shape[1] // rows, 1).expand(q.shape[0], -1, -1)
    return torch.softmax(torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale), dim=-1)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.window, ctx.scale = window, scale
        kv_heads, head_dim = k.shape[2:]
        queries = _by_head(q, kv_heads)
        keys, values = (_by_head(x, kv_heads).flatten(0, 2) for x in (k, v))
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        by_head = _by_head(out, kv_heads)
        for start in range(0, q.shape[1], _BLOCK):
            stop = min(start + _BLOCK, q.shape[1])
            seen = _keys_of(start, stop, window)
            block = queries[:, :, :, start:stop]
            probabilities = _probabilities(
                block.reshape(keys.shape[0], -1, head_dim), keys[:, seen], stop - start, window, scale
            )
            by_head[:, :, :, start:stop] = torch.bmm(probabilities, values[:, seen]).view(block.shape)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v = ctx.saved_tensors
        kv_heads, head_dim = k.shape[2:]
        queries, grads = _by_head(q, kv_heads), _by_head(grad, kv_heads)
        keys, values = (_by_head(x, kv_heads).flatten(0, 2) for x in (k, v))
        grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        grad_queries = _by_head(grad_q, kv_heads)
        # Each block adds to the gradients of its keys: in fp32, so that nothing is lost over many blocks.
        wide = torch.promote_types(q.dtype, torch.float32)
        grad_keys, grad_values = (torch.zeros(keys.shape, dtype=wide, device=q.device) for _ in range(2))
        for start in range(0, q.shape[1], _BLOCK):
            stop = min(start + _BLOCK, q.shape[1])
            seen = _keys_of(start, stop, ctx.window)
            block = queries[:, :, :, start:stop].reshape(keys.shape[0], -1, head_dim)
            block_grad = grads[:, :, :, start:stop].reshape(keys.shape[0], -1, head_dim)
            probabilities = _probabilities(block, keys[:, seen], stop - start, ctx.window, ctx.scale)
            grad_values[:, seen] += torch.bmm(probabilities.transpose(1, 2), block_grad)
            grad_probabilities = torch.bmm(block_grad, values[:, seen].transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_probabilities, probabilities, -1, q.dtype).mul_(ctx.scale)
            grad_block = torch.bmm(grad_scores, keys[:, seen])
            grad_queries[:, :, :, start:stop] = grad_block.view(*queries.shape[:3], -1, head_dim)
            grad_keys[:, seen] += torch.bmm(grad_scores.transpose(1, 2), block)
        back = (k.shape[0], kv_heads, k.shape[1], head_dim)
        grad_k, grad_v = (x.to(k.dtype).view(back).transpose(1, 2) for x in (grad_keys, grad_values))
        return grad_q, grad_k, grad_v, None, None
