"""Packed causal attention by PyTorch's flex attention, a Triton kernel that skips blocks without a visible pair.

Which blocks have one follows from the documents at the edges of blocks alone, so the mask costs (P / 128)^2 numbers and
no look at single tokens, no wait for the device, and no compilation for the lengths of a batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

_BLOCK = 128
"""Tokens of a block on either side: the size for which flex attention's kernels are tuned."""


@functools.cache
def _compiled() -> Callable[..., Any]:
    """Without compilation flex attention makes all scores."""
    return torch.compile(flex_attention)


def flex_document_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int | None, scale: float | None
) -> Tensor:
    """Causal attention inside the documents of a packed row.

    Args:
        q: `[P, H, D]`.
        k, v: `[P, K, D]`.
        cu_seqlens: int32 `[n + 1]`, from 0 to P.

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
    """What the tokens of a packed row of this length see: their document, up to themselves, `window` of it at most."""
    device = cu_seqlens.device
    document = torch.bucketize(torch.arange(length, device=device), cu_seqlens[1:], right=True)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (query >= key) & (document[query] == document[key])
        return seen if window is None else seen & (query - key < window)

    first = torch.arange(0, length, _BLOCK, device=device)
    last = (first + _BLOCK - 1).clamp(max=length - 1)
    queries, keys = (first[:, None], last[:, None]), (first, last)
    # Documents follow each other: an earlier block shares a document with a later one only through the last of its own
    # and the first of the other, and the nearest pair of tokens that share it stands at the blocks' edges.
    touched = (queries[0] >= keys[0]) & (document[keys[1]] == document[queries[0]])
    same = queries[0] == keys[0]
    whole = (queries[0] > keys[1]) & (document[keys[0]] == document[queries[1]])
    if window is not None:
        touched = touched & (queries[0] - keys[1] < window)
        whole = whole & (queries[1] - keys[0] < window)
    partly = (touched | same) & ~whole
    return BlockMask.from_kv_blocks(
        *_ordered(partly), *_ordered(whole), BLOCK_SIZE=_BLOCK, mask_mod=visible, seq_lengths=(length, length)
    )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """A boolean matrix `[n, n]` -> how many are set in a row `[1, 1, n]`, and their columns, these first
    `[1, 1, n, n]`."""
    columns = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], columns.int()[None, None]
