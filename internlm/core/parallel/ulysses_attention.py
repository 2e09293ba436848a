"""Attention over a sequence that is split over ranks.

An all-to-all before attention gathers the tokens and scatters the heads; another one after it does the reverse.
Source: DeepSpeed-Ulysses, Jacobs et al. 2023, arXiv:2309.14509.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from internlm.core.communication.exchange import SEQUENCE, exchange
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.weight_splits import kv_replicas
from internlm.model.ops.attention.causal_attention import VarlenMetadata
from internlm.model.ops.rotary import RotaryTables
from internlm.model.roles import HeadShape

_HEADS = 2
"""Dimension of the heads in `[B, S, heads, D]`."""


class UlyssesAttention(nn.Module):
    """Replaces an `InnerAttention` when each of the n ranks of the tensor axis holds S / n tokens.

    Args:
        inner: an `InnerAttention` or what replaces it; runs on all tokens of the context rank and H / n heads.
        context: this rank's position and process groups.
        heads: all heads of the layer.

    Raises:
        ConfigError: the heads cannot be split evenly over the ranks.
    """

    def __init__(self, inner: nn.Module, context: ParallelContext, heads: HeadShape) -> None:
        super().__init__()
        self.inner = inner
        self._context = context
        self._size, self._index = context.size("tensor"), context.index("tensor")
        self._replicas = kv_replicas(heads, self._size)

    def local_rotary(self, tables: RotaryTables) -> RotaryTables:
        """Rotary tables of all tokens -> those of this rank's tokens, as views."""
        cos, sin = (table.chunk(self._size, SEQUENCE)[self._index] for table in (tables.cos, tables.sin))
        return RotaryTables(cos, sin, tables.interleaved)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, varlen: VarlenMetadata | None, sinks: Tensor | None = None
    ) -> Tensor:
        """Compute attention over all S tokens.

        Args:
            q: `[B, S / n, H, D]`.
            k: `[B, S / n, K, D]`.
            v: `[B, S / n, K, D']`.
            varlen: documents of all S tokens.
            sinks: `[H]`, the logits of attention sinks; None: none.

        Returns:
            `[B, S / n, H, D']`.
        """
        q, k, v = self.gather_tokens(q, k, v)
        own_sinks = None if sinks is None else sinks.chunk(self._size)[self._index]
        return self.scatter_tokens(self.inner(q, k, v, varlen, own_sinks))

    def gather_tokens(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All heads of this rank's tokens -> this rank's heads of all tokens, in one all-to-all."""
        if self._replicas > 1:
            k, v = (x.repeat_interleave(self._replicas, dim=_HEADS) for x in (k, v))
        # Heads of a rank side by side, as values may have another dimension.
        by_rank = [x.unflatten(_HEADS, (self._size, -1)).flatten(_HEADS + 1) for x in (q, k, v)]
        joined = torch.cat(by_rank, dim=_HEADS + 1)
        gathered = exchange(joined, self._context.group("tensor"), split=_HEADS, join=SEQUENCE).squeeze(_HEADS)
        parts = gathered.split([x.shape[-1] for x in by_rank], dim=-1)
        own_q, own_k, own_v = (part.unflatten(-1, (-1, x.shape[-1])) for part, x in zip(parts, (q, k, v), strict=True))
        return own_q, own_k, own_v

    def scatter_tokens(self, out: Tensor) -> Tensor:
        """This rank's heads of all tokens -> all heads of this rank's tokens."""
        return exchange(out, self._context.group("tensor"), split=SEQUENCE, join=_HEADS)
