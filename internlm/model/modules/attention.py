"""The attention block of a decoder layer: projections, query and key norms, rotary embedding, cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from internlm.model.modules.attention_sinks import AttentionSinks
from internlm.model.modules.cache import CachedRows
from internlm.model.modules.inner_attention import InnerAttention
from internlm.model.modules.linear import GroupedLinear, UnpackedLinear, make_linear
from internlm.model.modules.norm import RMSNorm
from internlm.model.modules.projection_norm import ProjectionNorm
from internlm.model.ops.attention.causal_attention import VarlenMetadata
from internlm.model.ops.packed_projections import unpack_query_key_value
from internlm.model.ops.rotary import RotaryTables, apply_rotary
from internlm.model.roles import HeadShape

if TYPE_CHECKING:
    from internlm.model.architecture import Architecture


class Attention(nn.Module):
    """Grouped-query attention. H query heads, K key-value heads, g = H / K, D head dimension.

    The fused projection `wqkv` has its rows by key-value group: g query heads, then the group's key, then its value.
    Head counts are read off the outputs of the projections, so a rank that holds some of the groups runs the same code.

    Attributes:
        qkv: `x` -> queries, keys and values, from a fused projection or three.
        inner: softmax attention between the projections and `wo`; see `InnerAttention`.
        heads: all heads of this layer, also where a rank holds some of them.
    """

    def __init__(self, architecture: Architecture, layer: int) -> None:
        super().__init__()
        a = architecture
        self.layer = layer
        self.head_dim = a.head_dim
        self.heads = HeadShape(a.num_heads, a.num_kv_heads, a.head_dim)
        self.group_size = a.num_heads // a.num_kv_heads
        self.inner = InnerAttention(a.windows[layer], a.attention_backend, a.use_flash_attn)
        q_size, kv_size = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
        std = a.init.attention_wqkv
        if a.fused_qkv:
            self.wqkv = make_linear(a, a.hidden_size, q_size + 2 * kv_size, a.qkv_bias, std)
            self.qkv: UnpackedLinear | GroupedLinear = UnpackedLinear(self, "wqkv", self._unpack)
        else:
            self.wq = make_linear(a, a.hidden_size, q_size, a.qkv_bias, std)
            self.wk = make_linear(a, a.hidden_size, kv_size, a.qkv_bias, std)
            self.wv = make_linear(a, a.hidden_size, kv_size, a.qkv_bias, std)
            self.qkv = GroupedLinear(self, "wq", "wk", "wv")
        self.wo = make_linear(a, q_size, a.hidden_size, a.o_bias, a.init.attention_other, into_residual=True)
        self.sinks = AttentionSinks(a) if a.attention_sinks else None
        self.qk_norm = a.qk_norm
        self.clip_qkv = a.clip_qkv
        if a.norms_whole_projections:
            self.q_norm: nn.Module = ProjectionNorm(q_size, a.norm_eps, a.norm_dtype, fused_kernels=a.fused_kernels)
            self.k_norm: nn.Module = ProjectionNorm(kv_size, a.norm_eps, a.norm_dtype, fused_kernels=a.fused_kernels)
        elif a.qk_norm:
            self.q_norm = RMSNorm(a.head_dim, a.norm_eps, a.norm_dtype, fused_kernels=a.fused_kernels)
            self.k_norm = RMSNorm(a.head_dim, a.norm_eps, a.norm_dtype, fused_kernels=a.fused_kernels)

    def use_local_heads(self, heads: HeadShape) -> None:
        """Expect projections whose outputs have these heads instead of all of the layer's."""
        self.group_size = heads.num_heads // heads.num_kv_heads

    def forward(
        self, x: Tensor, rotary: RotaryTables, varlen: VarlenMetadata | None = None, cache: CachedRows | None = None
    ) -> Tensor:
        """`[B, S, h]` -> `[B, S, h]`."""
        # Lengths are read off the projections too: they may gather a sequence that is split over ranks.
        q, k, v = (out.unflatten(-1, (-1, self.head_dim)) for out in self.qkv(x))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.clip_qkv is not None:
            q, k, v = (x.clamp(-self.clip_qkv, self.clip_qkv) for x in (q, k, v))
        tables = self.inner.local_rotary(rotary)
        q, k = apply_rotary(q, tables), apply_rotary(k, tables)
        sinks = () if self.sinks is None else (self.sinks.weight,)
        if cache is None:
            return self.wo(self.inner(q, k, v, varlen, *sinks).flatten(2))
        mask = cache.mask(q.shape[1], self.inner.window)
        k, v = cache.update(self.layer, k, v)
        return self.wo(self.inner.to_cached(q, k, v, mask, *sinks).flatten(2))

    def _unpack(self, packed: Tensor) -> tuple[Tensor, ...]:
        return unpack_query_key_value(packed, self.group_size, self.head_dim)
