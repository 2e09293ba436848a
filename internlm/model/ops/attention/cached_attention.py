"""Attention of new tokens to the cached keys of rows of unequal length, for generation."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, scale: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    """Softmax attention with an explicit mask. Keys and values that nothing attends to may be anything but NaN or inf.

    Args:
        q: `[B, S, H, D]`.
        k: `[B, T, K, D]`; query head i uses key-value head i // (H / K).
        v: `[B, T, K, D']`.
        mask: bool `[B, 1, S, T]`, True for the keys that a query attends to, at least one.
        scale: factor on the scores; None: 1 / sqrt(D).
        sinks: `[H]`, the logits of attention sinks, see `sink_attention`; None: none.

    Returns:
        `[B, S, H, D']` in the dtype of q.
    """
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if sinks is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=group > 1)
        return out.transpose(1, 2)
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.to(wide).repeat_interleave(group, dim=1) for x in (k, v))
    scores = (q.to(wide) @ k.transpose(2, 3)) * (scale or 1 / math.sqrt(q.shape[-1]))
    sink = sinks.to(wide).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    weights = torch.cat((scores.masked_fill(~mask, -torch.inf), sink), dim=-1).softmax(dim=-1)
    return (weights[..., :-1] @ v).to(q.dtype).transpose(1, 2)
