"""Causal attention of a packed row by parts of its keys, one after the other, to compare with plain attention."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from internlm.model.ops.attention.partial_attention import Tile, add_partial_attention, partial_attention_backward


def attention_in_parts(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], num_parts: int, *, window: int | None = None
) -> Tensor:
    """Causal attention within documents; `partial_attention` gets the keys in `num_parts` parts, cut at any token.

    Args:
        q: `[1, S, H, D]`.
        k: `[1, S, K, D]`.
        v: `[1, S, K, D']`.
        lengths: of the documents; their sum is S.
        num_parts: number of parts, at most S.
        window: maximum number of keys that a query attends to, itself included; None: no limit.

    Returns:
        `[1, S, H, D']` in the dtype of q; differentiable.
    """
    result: Tensor = _AttentionInParts.apply(q[0], k[0], v[0], lengths, num_parts, window)
    return result.unsqueeze(0)


class _AttentionInParts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], num_parts: int, window: int | None
    ) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        out = q.new_zeros((*q.shape[:2], v.shape[2]), dtype=wide)
        lse = q.new_full(q.shape[:2], -math.inf, dtype=wide)
        for keys, tiles in _parts(lengths, num_parts):
            add_partial_attention(out, lse, q, k[keys], v[keys], tiles, window=window)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.lengths, ctx.num_parts, ctx.window = lengths, num_parts, window
        return out.to(q.dtype)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v))
        for keys, tiles in _parts(ctx.lengths, ctx.num_parts):
            partial_attention_backward(
                *(grad_out, q, k[keys], v[keys], out, lse, tiles),
                window=ctx.window,
                grad_q=grad_q,
                grad_k=grad_k[keys],
                grad_v=grad_v[keys],
            )
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None


def _parts(lengths: Sequence[int], num_parts: int) -> Iterator[tuple[slice, list[Tile]]]:
    """The rows of each part's keys, and one tile for each of its documents: all queries from its first key on."""
    bounds = list(itertools.accumulate(lengths, initial=0))
    for part in range(num_parts):
        start, stop = (bounds[-1] * number // num_parts for number in (part, part + 1))
        tiles = [
            Tile(max(start, first), last, max(start, first) - start, min(stop, last) - start, 0)
            for first, last in itertools.pairwise(bounds)
            if max(start, first) < min(stop, last)
        ]
        yield slice(start, stop), tiles
