"""Causal attention on CPU as batched matrix products over blocks of queries: for 16-bit tensors, and for windows.

PyTorch's CPU flash kernel does its 16-bit backward pass in small tiles and takes about twice as long. Here a block of
queries meets all its keys in one product, which the matrix units like; a block's scores are gone before those of the
next are made, and the backward pass makes them again. Memory beyond the inputs: B x H x block x S scores.

The scores are rounded to the type of the queries before the softmax (itself at least fp32 inside), as in any attention
that is written as two matrix products; the probabilities are rounded in either kernel.

Shapes: B sequences, S tokens, K key-value heads, g query heads for each of them, D head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

_BLOCK = 128
"""Queries a block: smaller blocks waste less on masked keys, larger ones make better matrix products."""


def blocked_forward(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    """Causal attention of equally long sequences.

    Args:
        q: `[B, S, K g, D]`.
        k, v: `[B, S, K, D]`.
        window: keys that a query sees at most, itself included; None: all before it.
        scale: factor of the scores.

    Returns:
        `[B, S, K g, D]`, contiguous.
    """
    kv_heads = k.shape[2]
    queries = _by_head(q, kv_heads)
    keys, values = (_by_head(x, kv_heads).flatten(0, 2) for x in (k, v))
    out = q.new_empty(q.shape)
    by_head = _by_head(out, kv_heads)
    for rows, seen in _blocks(q.shape[1], window):
        block = _flat(queries, rows)
        probabilities = _probabilities(block, keys[:, seen], rows, seen, window, scale)
        by_head[:, :, :, rows] = torch.bmm(probabilities, values[:, seen]).view(by_head[:, :, :, rows].shape)
    return out


def blocked_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the queries, keys and values (contiguous), given that of the result."""
    kv_heads = k.shape[2]
    queries, grads = _by_head(q, kv_heads), _by_head(grad, kv_heads)
    keys, values = (_by_head(x, kv_heads).flatten(0, 2) for x in (k, v))
    grad_q = q.new_empty(q.shape)
    grad_queries = _by_head(grad_q, kv_heads)
    # Each block adds to the gradients of its keys: in fp32, so that nothing is lost over many blocks.
    wide = torch.promote_types(q.dtype, torch.float32)
    grad_keys, grad_values = (keys.new_zeros(keys.shape, dtype=wide) for _ in range(2))
    for rows, seen in _blocks(q.shape[1], window):
        block, block_grad = _flat(queries, rows), _flat(grads, rows)
        probabilities = _probabilities(block, keys[:, seen], rows, seen, window, scale)
        grad_values[:, seen] += torch.bmm(probabilities.transpose(1, 2), block_grad)
        grad_scores = torch.bmm(block_grad, values[:, seen].transpose(1, 2))
        grad_scores = torch._softmax_backward_data(grad_scores, probabilities, -1, q.dtype)
        grad_block = _scaled_product(grad_scores, keys[:, seen], scale)
        grad_queries[:, :, :, rows] = grad_block.view(grad_queries[:, :, :, rows].shape)
        grad_keys[:, seen] += torch.bmm(grad_scores.transpose(1, 2), block)
    back = (k.shape[0], kv_heads, *k.shape[1:2], k.shape[3])
    grad_k, grad_v = k.new_empty(k.shape), v.new_empty(v.shape)
    grad_k.copy_(grad_keys.mul_(scale).view(back).transpose(1, 2))
    grad_v.copy_(grad_values.view(back).transpose(1, 2))
    return grad_q, grad_k, grad_v


def _by_head(x: Tensor, kv_heads: int) -> Tensor:
    """`[B, S, K g, D]` -> view `[B, K, g, S, D]`."""
    return x.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)


def _flat(by_head: Tensor, rows: slice) -> Tensor:
    """Some rows of `[B, K, g, S, D]` -> `[B K, g rows, D]`."""
    part = by_head[:, :, :, rows]
    return part.reshape(part.shape[0] * part.shape[1], -1, part.shape[-1])


def _blocks(length: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Rows of each block, and the keys that some of them see; the last key is level with the last row."""
    for start in range(0, length, _BLOCK):
        stop = min(start + _BLOCK, length)
        yield slice(start, stop), slice(0 if window is None else max(0, start - window + 1), stop)


def _scaled_product(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """`scale x y` for batches of matrices, scaled before rounding."""
    out = x.new_empty(x.shape[0], x.shape[1], y.shape[2])
    return out.baddbmm_(x, y, beta=0, alpha=scale)


def _probabilities(q: Tensor, k: Tensor, rows: slice, seen: slice, window: int | None, scale: float) -> Tensor:
    """Softmax of a block's scores: `[B K, g rows, T]` for queries `[B K, g rows, D]` and keys `[B K, T, D]`."""
    scores = _scaled_product(q, k.transpose(1, 2), scale)
    num_rows, num_keys = rows.stop - rows.start, seen.stop - seen.start
    by_row = scores.view(q.shape[0], -1, num_rows, num_keys)
    # Above the diagonal, and only there, a key is too late: that is in the last square.
    square = torch.ones(num_rows, num_rows, dtype=torch.bool, device=q.device)
    by_row[..., num_keys - num_rows :].masked_fill_(square.triu(1), -math.inf)
    if window is not None:
        everywhere = torch.ones(num_rows, num_keys, dtype=torch.bool, device=q.device)
        by_row.masked_fill_(everywhere.tril(num_keys - num_rows - window), -math.inf)
    return torch.softmax(scores, dim=-1)
