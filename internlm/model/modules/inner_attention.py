"""Softmax attention between the projections of an attention block and its output projection."""

from __future__ import annotations

import math
from typing import TypedDict

from torch import Tensor, nn
from torch.nn import functional as F

from internlm.model.ops.attention.cached_attention import cached_attention
from internlm.model.ops.attention.causal_attention import VarlenMetadata, attention
from internlm.model.ops.attention.sink_attention import sink_attention
from internlm.model.ops.rotary import RotaryTables


class _Options(TypedDict):
    window: int | None
    scale: float | None
    attention_backend: str
    use_flash_attn: bool


class InnerAttention(nn.Module):
    """Causal softmax attention over all tokens of the micro-batch.

    A parallel mode that splits the sequence replaces this module by one that works on a part of the tokens.

    Args:
        window: maximum number of keys that a query attends to, itself included; None: no limit.
        attention_backend, use_flash_attn, scale: see `attention`.
    """

    def __init__(
        self, window: int | None, attention_backend: str, use_flash_attn: bool, scale: float | None = None
    ) -> None:
        super().__init__()
        self.window = window
        self.scale = scale
        self.attention_backend = attention_backend
        self.use_flash_attn = use_flash_attn

    def local_rotary(self, tables: RotaryTables) -> RotaryTables:
        """Rotary tables of all tokens -> those of the tokens that `forward` gets."""
        return tables

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, varlen: VarlenMetadata | None, sinks: Tensor | None = None
    ) -> Tensor:
        """Compute attention.

        Args:
            q: `[B, S, H, D]`, after rotary embedding and norm.
            k: `[B, T, K, D]`, likewise; T > S with cached keys.
            v: `[B, T, K, D']`; D' may differ from D.
            varlen: documents of the whole packed sequence, even if ranks split it; None: each row is one document.
            sinks: `[H]`, the logits of attention sinks; None: none.

        Returns:
            `[B, S, H, D']`.
        """
        if sinks is not None:
            return sink_attention(q, k, v, sinks, varlen, window=self.window)
        if v.shape[-1] == q.shape[-1]:
            return attention(q, k, v, varlen, **self._options(q, v))
        return attention(*_of_one_width(q, k, v), varlen, **self._options(q, v))[..., : v.shape[-1]]

    def to_cached(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None = None) -> Tensor:
        """`forward` of new tokens, whose queries see the keys of a cache.

        Args:
            mask: see `CachedRows.mask`; None: the queries are the last S of the T positions, of every row.
        """
        if mask is None:
            return self(q, k, v, None, sinks)
        return cached_attention(q, k, v, mask, scale=self.scale, sinks=sinks)

    def forward_with_lse(self, q: Tensor, k: Tensor, v: Tensor, varlen: VarlenMetadata | None) -> tuple[Tensor, Tensor]:
        """`forward`, and the log-sum-exp of each query's scores, fp32 `[B, S, H]` (float64 for float64).

        With it, results over parts of the keys can be combined.

        Raises:
            ValueError: the attention backend does not return it.
        """
        if v.shape[-1] == q.shape[-1]:
            return attention(q, k, v, varlen, return_lse=True, **self._options(q, v))
        out, lse = attention(*_of_one_width(q, k, v), varlen, return_lse=True, **self._options(q, v))
        return out[..., : v.shape[-1]], lse

    def _options(self, q: Tensor, v: Tensor) -> _Options:
        needs_scale = self.scale is None and v.shape[-1] != q.shape[-1]
        return {
            "window": self.window,
            "scale": 1 / math.sqrt(q.shape[-1]) if needs_scale else self.scale,
            "attention_backend": self.attention_backend,
            "use_flash_attn": self.use_flash_attn,
        }


def _of_one_width(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pad the last dimension with zeros, as kernels need heads of one width; the results are the same."""
    width = max(q.shape[-1], v.shape[-1])
    q, k, v = (F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in (q, k, v))
    return q, k, v
