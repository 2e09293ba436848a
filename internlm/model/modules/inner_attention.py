"""Softmax attention between the projections of an attention block and its output projection."""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor, nn

from internlm.model.ops.attention.causal_attention import VarlenMetadata, attention
from internlm.model.ops.rotary import RotaryTables


class _Options(TypedDict):
    window: int | None
    attention_backend: str
    use_flash_attn: bool


class InnerAttention(nn.Module):
    """Causal softmax attention over all tokens of the micro-batch.

    A parallel mode that splits the sequence replaces this module by one that works on a part of the tokens.

    Args:
        window: maximum number of keys that a query attends to, itself included; None: no limit.
        attention_backend, use_flash_attn: see `attention`.
    """

    def __init__(self, window: int | None, attention_backend: str, use_flash_attn: bool) -> None:
        super().__init__()
        self.window = window
        self.attention_backend = attention_backend
        self.use_flash_attn = use_flash_attn

    def local_rotary(self, tables: RotaryTables) -> RotaryTables:
        """Rotary tables of all tokens -> those of the tokens that `forward` gets."""
        return tables

    def forward(self, q: Tensor, k: Tensor, v: Tensor, varlen: VarlenMetadata | None) -> Tensor:
        """Compute attention.

        Args:
            q: `[B, S, H, D]`, after rotary embedding and norm.
            k: `[B, T, K, D]`, likewise; T > S with cached keys.
            v: `[B, T, K, D]`.
            varlen: documents of the whole packed sequence, even if ranks split it; None: each row is one document.

        Returns:
            `[B, S, H, D]`.
        """
        return attention(q, k, v, varlen, **self._options())

    def forward_with_lse(self, q: Tensor, k: Tensor, v: Tensor, varlen: VarlenMetadata | None) -> tuple[Tensor, Tensor]:
        """`forward`, and the log-sum-exp of each query's scores, fp32 `[B, S, H]` (float64 for float64).

        With it, results over parts of the keys can be combined.

        Raises:
            ValueError: the attention backend does not return it.
        """
        return attention(q, k, v, varlen, return_lse=True, **self._options())

    def _options(self) -> _Options:
        return {
            "window": self.window,
            "attention_backend": self.attention_backend,
            "use_flash_attn": self.use_flash_attn,
        }
