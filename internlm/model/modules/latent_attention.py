"""Multi-head latent attention (MLA): keys and values of all heads are projections of one small latent vector.

For a token with hidden state x and each of H heads:

    c_q = norm(W_qa x)                  q = [q_plain, rotary(q_rotary)], rows of W_qb c_q (or of W_q x)
    [c_kv, k_rotary] = W_kva x          [k_plain, v] rows of W_kvb norm(c_kv)
    k = [k_plain, rotary(k_rotary)], where k_rotary is the same for all heads

Scores are divided by sqrt(d), where d counts all channels of a query head, and multiplied by the factor of YaRN's
`mscale_all_dim`. Source: DeepSeek-V2, https://arxiv.org/abs/2405.04434, section 2.1 and appendix C.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from internlm.model.modules.cache import CachedRows
from internlm.model.modules.inner_attention import InnerAttention
from internlm.model.modules.linear import GroupedLinear, make_linear
from internlm.model.modules.norm import RMSNorm
from internlm.model.ops.attention.causal_attention import VarlenMetadata
from internlm.model.ops.rotary import RotaryTables, apply_rotary
from internlm.model.roles import HeadShape

if TYPE_CHECKING:
    from internlm.model.architecture import Architecture

LATENT_NORM_EPS = 1e-6
"""Epsilon of the norms of latent vectors, whatever that of the model's norms is: as in DeepSeek's and transformers'
code."""

_HEADS = 2
"""Dimension of the heads in `[B, S, heads, D]`."""


class LatentAttention(nn.Module):
    """Multi-head latent attention; see the module docstring.

    The number of heads is read off the outputs of the projections, so a rank that holds some of the heads runs the same
    code. The latent vectors are computed from the residual stream by every rank that has the token; only the
    projections from them are split by head.

    Attributes:
        share_key: this rank's rotary keys `[B, S, d_r]` -> those of the tokens for which the projections by head
            return outputs. Its backward pass sums the gradients of the heads of all ranks. None: the rank has all.
        gather_keys: latent vectors `[B, S', r]` and rotary keys `[B, S, 1, d_r]` of this rank's tokens, documents ->
            those of all tokens that `inner` needs keys of, where ranks share a sample and `inner` does not exchange
            keys of all heads. None: `inner` has or exchanges them.
        inner: softmax attention between the projections and `wo`; see `InnerAttention`.
        heads: all heads of this layer, also where a rank holds some of them.
    """

    def __init__(self, architecture: Architecture, layer: int) -> None:
        super().__init__()
        a, shape = architecture, architecture.latent
        assert shape is not None
        self.layer = layer
        self.shape = shape
        self.heads = HeadShape(a.num_heads, a.num_heads, shape.head_dim)
        self.share_key: Callable[[Tensor], Tensor] | None = None
        self.gather_keys: Callable[[Tensor, Tensor, VarlenMetadata | None], tuple[Tensor, Tensor]] | None = None
        scale = a.rope.score_factor / math.sqrt(shape.head_dim)
        self.inner = InnerAttention(a.windows[layer], a.attention_backend, a.use_flash_attn, scale)
        std, q_size = a.init.attention_wqkv, a.num_heads * shape.head_dim
        # In the order of use, in which isp gathers them.
        if shape.q_rank is None:
            self.wq = make_linear(a, a.hidden_size, q_size, False, std)
            self.wkv_a = make_linear(a, a.hidden_size, shape.down_rows, False, std)
        else:
            self.wq_a = make_linear(a, a.hidden_size, shape.q_rank, False, std)
            self.wkv_a = make_linear(a, a.hidden_size, shape.down_rows, False, std)
            self.down = GroupedLinear(self, "wq_a", "wkv_a")
            self.q_a_norm = RMSNorm(shape.q_rank, LATENT_NORM_EPS, a.norm_dtype, fused_kernels=a.fused_kernels)
            self.wq_b = make_linear(a, shape.q_rank, q_size, False, std)
        self.kv_a_norm = RMSNorm(shape.kv_rank, LATENT_NORM_EPS, a.norm_dtype, fused_kernels=a.fused_kernels)
        self.wkv_b = make_linear(a, shape.kv_rank, a.num_heads * (shape.plain_dim + shape.value_dim), False, std)
        o_size = a.num_heads * shape.value_dim
        self.wo = make_linear(a, o_size, a.hidden_size, False, a.init.attention_other, into_residual=True)

    def forward(
        self, x: Tensor, rotary: RotaryTables, varlen: VarlenMetadata | None = None, cache: CachedRows | None = None
    ) -> Tensor:
        """`[B, S, h]` -> `[B, S, h]`; the cache holds latent vectors and rotary keys."""
        shape = self.shape
        if shape.q_rank is None:
            q, compressed = self.wq(x), self.wkv_a(x)
        else:
            q_latent, compressed = self.down(x)
            q = self.wq_b(self.q_a_norm(q_latent))
        latent, key = compressed.split([shape.kv_rank, shape.rotary_dim], dim=-1)
        latent = self.kv_a_norm(latent)
        tables = self.inner.local_rotary(rotary)
        if self.share_key is not None:
            key = self.share_key(key)
        key = apply_rotary(key.unsqueeze(_HEADS), tables)
        if self.gather_keys is not None:
            latent, key = self.gather_keys(latent, key, varlen)
        if cache is not None:
            latent, key = cache.update(self.layer, latent.unsqueeze(_HEADS), key)
            latent = latent.squeeze(_HEADS)
        # Lengths are read off the projections: they may gather a sequence that is split over ranks.
        k_plain, v = (
            self.wkv_b(latent)
            .unflatten(-1, (-1, shape.plain_dim + shape.value_dim))
            .split([shape.plain_dim, shape.value_dim], dim=-1)
        )
        q_plain, q_rotary = q.unflatten(-1, (-1, shape.head_dim)).split([shape.plain_dim, shape.rotary_dim], dim=-1)
        q = torch.cat((q_plain, apply_rotary(q_rotary, tables)), dim=-1)
        k = torch.cat((k_plain, key.expand(-1, -1, k_plain.shape[_HEADS], -1)), dim=-1)
        if cache is None:
            return self.wo(self.inner(q, k, v, varlen).flatten(_HEADS))
        mask = cache.mask(q.shape[1], self.inner.window)
        return self.wo(self.inner.to_cached(q, k, v, mask).flatten(_HEADS))
