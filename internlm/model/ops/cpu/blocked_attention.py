"""Causal attention on CPU as batched GEMMs over blocks of queries, for 16-bit backward passes and windows.

PyTorch's CPU flash kernel runs its 16-bit backward pass in small tiles. Here, the scores of a block of queries are one
batched GEMM, which matrix units run faster. Scores are recomputed in backward; only those of some heads in one block
are in memory at a time.

Scores are rounded to the dtype of the queries before the softmax (which computes in fp32 or float64), as in any
attention made of two GEMMs; probabilities are rounded in either kernel.

Shapes: B sequences, S tokens, K key-value heads, g query heads per key-value head, D head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

_BLOCK = 128
"""Queries per block: smaller blocks compute fewer masked scores, larger ones give faster GEMMs."""

_SCORES = 1 << 20
"""Maximum number of scores in memory (at least those of one head), so that they stay in a core's cache."""


def blocked_forward(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    """Causal attention of sequences of equal length.

    Args:
        q: `[B, S, K g, D]`.
        k, v: `[B, S, K, D]`.
        window: maximum number of keys that a query attends to, itself included; None: no limit.
        scale: factor on the scores.

    Returns:
        `[B, S, K g, D]`, contiguous.
    """
    queries, keys, values = (_by_head(x, k.shape[2]) for x in (q, k, v))
    out = torch.empty_like(queries)
    for heads in _heads_at_once(queries):
        key, value = keys[heads, 0], values[heads, 0]
        for rows, columns in _blocks(q.shape[1], window):
            block = queries[heads, :, rows]
            probabilities = _probabilities(block.flatten(1, 2), key[:, columns], rows, columns, window, scale)
            out[heads, :, rows] = torch.bmm(probabilities, value[:, columns]).view(block.shape)
    return _from_heads(out, q)


def blocked_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, contiguous; `grad` is that of the result."""
    grads, queries, keys, values = (_by_head(x, k.shape[2]) for x in (grad, q, k, v))
    grad_queries, grad_keys, grad_values = (torch.empty_like(x) for x in (queries, keys, values))
    # Each block adds to the gradients of its keys: in fp32, so that rounding errors do not accumulate over blocks.
    wide = torch.promote_types(q.dtype, torch.float32)
    for heads in _heads_at_once(queries):
        key, value = keys[heads, 0], values[heads, 0]
        grad_key, grad_value = torch.zeros_like(key, dtype=wide), torch.zeros_like(value, dtype=wide)
        for rows, columns in _blocks(q.shape[1], window):
            block, block_grad = (x[heads, :, rows].flatten(1, 2) for x in (queries, grads))
            probabilities = _probabilities(block, key[:, columns], rows, columns, window, scale)
            grad_value[:, columns] += torch.bmm(probabilities.transpose(1, 2), block_grad)
            grad_scores = torch.bmm(block_grad, value[:, columns].transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_scores, probabilities, -1, q.dtype)
            grad_block = _scaled_bmm(grad_scores, key[:, columns], scale)
            grad_queries[heads, :, rows] = grad_block.view(grad_queries[heads, :, rows].shape)
            grad_key[:, columns] += torch.bmm(grad_scores.transpose(1, 2), block)
        grad_keys[heads, 0] = grad_key.mul_(scale).to(k.dtype)
        grad_values[heads, 0] = grad_value.to(v.dtype)
    return _from_heads(grad_queries, q), _from_heads(grad_keys, k), _from_heads(grad_values, v)


def _by_head(x: Tensor, kv_heads: int) -> Tensor:
    """`[B, S, K g, D]` -> `[B K, g, S, D]`, contiguous."""
    return x.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1).contiguous()


def _from_heads(by_head: Tensor, like: Tensor) -> Tensor:
    """`[B K, g, S, D]` -> `[B, S, K g, D]`, contiguous, with the shape of `like`."""
    batch, length, _, head_dim = like.shape
    return by_head.view(batch, -1, length, head_dim).transpose(1, 2).contiguous()


def _heads_at_once(queries: Tensor) -> Iterator[slice]:
    """Slices of the first dimension of `[B K, g, S, D]` whose scores fit into `_SCORES`."""
    num_heads, group, length, _ = queries.shape
    step = max(1, _SCORES // (group * min(_BLOCK, length) * length))
    for start in range(0, num_heads, step):
        yield slice(start, start + step)


def _blocks(length: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """(queries, keys that any of them attends to) of each block; the last key is at the position of the last query."""
    for start in range(0, length, _BLOCK):
        stop = min(start + _BLOCK, length)
        yield slice(start, stop), slice(0 if window is None else max(0, start - window + 1), stop)


def _scaled_bmm(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """Batched GEMM `scale x y`, scaled before rounding."""
    out = x.new_empty(x.shape[0], x.shape[1], y.shape[2])
    return out.baddbmm_(x, y, beta=0, alpha=scale)


def _probabilities(q: Tensor, k: Tensor, rows: slice, columns: slice, window: int | None, scale: float) -> Tensor:
    """Softmax of a block's scores: `[n, g rows, T]` for queries `[n, g rows, D]` and keys `[n, T, D]` of n heads."""
    scores = _scaled_bmm(q, k.transpose(1, 2), scale)
    num_rows, num_keys = rows.stop - rows.start, columns.stop - columns.start
    by_row = scores.view(q.shape[0], -1, num_rows, num_keys)
    # Causality masks the part above the diagonal of the last square. Adding -inf is vectorized, `masked_fill` is not.
    by_row[..., num_keys - num_rows :].add_(_minus_infinity(q, num_rows, num_rows).triu(1))
    if window is not None:
        by_row.add_(_minus_infinity(q, num_rows, num_keys).tril(num_keys - num_rows - window))
    return torch.softmax(scores, dim=-1)


def _minus_infinity(like: Tensor, *shape: int) -> Tensor:
    return torch.full(shape, -math.inf, dtype=like.dtype, device=like.device)
