"""Packed causal attention with PyTorch's flex attention, a Triton kernel that skips fully masked blocks.

The block mask is computed from the documents at block edges only. It has (P / 128)^2 entries, does not wait for the
device, and needs no recompilation when the lengths of a batch change.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

_BLOCK = 128
"""Queries and keys per block: the size for which flex attention's kernels are tuned."""


@functools.cache
def _compiled() -> Callable[..., Any]:
    """Compiled flex attention; uncompiled, it materializes all scores."""
    return torch.compile(flex_attention)


def flex_document_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int | None, scale: float | None
) -> Tensor:
    """Causal attention within the documents of a packed row.

    Args:
        q: `[P, H, D]`.
        k, v: `[P, K, D]`.
        cu_seqlens: int32 `[n + 1]`, from 0 to P.
        window: maximum number of keys that a query attends to, itself included; None: no limit.
        scale: factor on the scores; None: 1 / sqrt(D).

    Returns:
        `[P, H, D]`.
    """
    run = cast(Callable[..., Any], flex_attention if torch.compiler.is_compiling() else _compiled())
    out = run(
        *(x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)),
        block_mask=document_mask(cu_seqlens, q.shape[0], window),
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    result: Tensor = out[0].transpose(0, 1)
    return result


def document_mask(cu_seqlens: Tensor, length: int, window: int | None) -> BlockMask:
    """Block mask of a packed row: a token attends to at most `window` tokens of its document, up to itself.

    Args:
        cu_seqlens: int32 `[n + 1]`, from 0 to `length`.
        length: tokens of the row.
        window: see `flex_document_attention`.
    """
    device = cu_seqlens.device
    document = torch.bucketize(torch.arange(length, device=device), cu_seqlens[1:], right=True)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        allowed = (query >= key) & (document[query] == document[key])
        return allowed if window is None else allowed & (query - key < window)

    first = torch.arange(0, length, _BLOCK, device=device)
    last = (first + _BLOCK - 1).clamp(max=length - 1)
    queries, keys = (first[:, None], last[:, None]), (first, last)
    # Documents are contiguous, so two blocks share a document only if the last token of the key block and the first of
    # the query block belong to it; these are also the nearest two tokens of the blocks.
    overlaps = (queries[0] >= keys[0]) & (document[keys[1]] == document[queries[0]])
    diagonal = queries[0] == keys[0]
    full = (queries[0] > keys[1]) & (document[keys[0]] == document[queries[1]])
    if window is not None:
        overlaps = overlaps & (queries[0] - keys[1] < window)
        full = full & (queries[1] - keys[0] < window)
    partial = (overlaps | diagonal) & ~full
    return BlockMask.from_kv_blocks(
        *_sparse_rows(partial), *_sparse_rows(full), BLOCK_SIZE=_BLOCK, mask_mod=visible, seq_lengths=(length, length)
    )


def _sparse_rows(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The sparse form of a boolean matrix `[n, n]`.

    Returns:
        (number of set entries per row `[1, 1, n]`, column indices `[1, 1, n, n]`, those of set entries first).
    """
    columns = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], columns.int()[None, None]
