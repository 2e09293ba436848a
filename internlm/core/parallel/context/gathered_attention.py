"""Latent attention over a sample whose tokens are dealt to context ranks: latent vectors travel, not keys and values.

A latent vector and its rotary key are much smaller than the keys and values of all heads, which each rank expands from
those that its queries need. Source: DeepSeek-V2, https://arxiv.org/abs/2405.04434, section 2.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from internlm.core.communication.exchange import gather
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.context.context_attention import context_groups, split_documents
from internlm.core.parallel.context.gathered_rows import gather_rows
from internlm.model.modules.inner_attention import InnerAttention
from internlm.model.ops.attention.causal_attention import VarlenMetadata
from internlm.model.ops.attention.partial_attention import Tile, add_partial_attention, partial_attention_backward
from internlm.model.ops.rotary import RotaryTables
from internlm.model.recompute import as_attention_operator


class LatentGathering:
    """Gathers latent vectors and rotary keys over context ranks; see `LatentAttention.gather_keys`.

    Args:
        context: this rank's position and process groups; collective over all ranks.
        window: of the attention.
        tensor_group: ranks that divide the latent vectors of a context rank further; None: they do not.
    """

    def __init__(
        self, context: ParallelContext, window: int | None, tensor_group: dist.ProcessGroup | None = None
    ) -> None:
        self._groups = context_groups(context)
        self._window = window
        self._tensor_group = tensor_group

    def __call__(self, latent: Tensor, key: Tensor, varlen: VarlenMetadata | None) -> tuple[Tensor, Tensor]:
        """Latent vectors `[1, S', r]` and rotary keys `[1, S, 1, d_r]` -> `[1, N, r]` and `[1, N, 1, d_r]`.

        Raises:
            ValueError: the tokens were not dealt to the context ranks.
        """
        gathering = split_documents(varlen).gatherings[self._window]
        rows = torch.cat((gather(latent, self._tensor_group), key.squeeze(2)), dim=-1)
        latent, key = gather_rows(rows, gathering, self._groups).split([latent.shape[-1], key.shape[-1]], dim=-1)
        return latent, key.unsqueeze(2)


class GatheredAttention(nn.Module):
    """Replaces an `InnerAttention` whose keys were gathered from all context ranks.

    Args:
        inner: whose settings it takes over.
    """

    def __init__(self, inner: InnerAttention) -> None:
        super().__init__()
        self.window = inner.window
        self.scale = inner.scale

    def local_rotary(self, tables: RotaryTables) -> RotaryTables:
        """Rotary tables of the tokens of which `forward` gets queries: those of this rank."""
        return tables

    def forward(self, q: Tensor, k: Tensor, v: Tensor, varlen: VarlenMetadata | None) -> Tensor:
        """Compute attention.

        Args:
            q: `[1, S, H, D]`, of this rank's tokens.
            k: `[1, N, K, D]`, of the gathered tokens.
            v: `[1, N, K, D']`.
            varlen: a `SplitDocuments`.

        Returns:
            `[1, S, H, D']`.

        Raises:
            ValueError: the tokens were not dealt to the context ranks.
        """
        scale = 1 / math.sqrt(q.shape[-1]) if self.scale is None else self.scale
        tiles = split_documents(varlen).gatherings[self.window].tiles
        result: Tensor = _TileAttention.apply(q, k, v, tiles, self.window, scale)
        return result


class _TileAttention(torch.autograd.Function):
    """Attention of queries to keys that this rank has, as tiles."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[Tile], window: int | None, scale: float
    ) -> Tensor:
        def run() -> list[Tensor]:
            wide = torch.promote_types(q.dtype, torch.float32)
            out = q.new_zeros((*q.shape[1:3], v.shape[-1]), dtype=wide)
            lse = q.new_full(q.shape[1:3], -math.inf, dtype=wide)
            add_partial_attention(out, lse, q[0], k[0], v[0], tiles, window=window, scale=scale)
            return [out.to(q.dtype).unsqueeze(0), lse]

        out, lse = as_attention_operator(run, q)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.tiles, ctx.window, ctx.scale = tiles, window, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        grad_q, grad_k, grad_v = (torch.zeros_like(x[0], dtype=lse.dtype) for x in (q, k, v))
        partial_attention_backward(
            *(grad[0], q[0], k[0], v[0], out[0], lse, ctx.tiles),
            window=ctx.window,
            scale=ctx.scale,
            grad_q=grad_q,
            grad_k=grad_k,
            grad_v=grad_v,
        )
        grads = (total.to(q.dtype).unsqueeze(0) for total in (grad_q, grad_k, grad_v))
        return *grads, None, None, None
