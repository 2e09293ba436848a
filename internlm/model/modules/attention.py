"""The attention block of a decoder layer: projections, query and key norms, rotary embedding, cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from internlm.model.modules.cache import KeyValueCache
from internlm.model.modules.inner_attention import InnerAttention
from internlm.model.modules.linear import GroupedLinear, make_linear
from internlm.model.modules.norm import RMSNorm
from internlm.model.ops.attention.causal_attention import VarlenMetadata
from internlm.model.ops.rotary import RotaryTables, apply_rotary, split_rotary
from internlm.model.roles import HeadShape

if TYPE_CHECKING:
    from internlm.model.architecture import Architecture


class Attention(nn.Module):
    """Grouped-query attention. H query heads, K key-value heads, g = H / K, D head dimension.

    The fused projection `wqkv` has its rows by key-value group: g query heads, then the group's key, then its value.
    Head counts are read off the outputs of the projections, so a rank that holds some of the groups runs the same code.

    Attributes:
        qkv: the projections, fused or not.
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
            self.qkv = GroupedLinear(self, "wqkv")
        else:
            self.wq = make_linear(a, a.hidden_size, q_size, a.qkv_bias, std)
            self.wk = make_linear(a, a.hidden_size, kv_size, a.qkv_bias, std)
            self.wv = make_linear(a, a.hidden_size, kv_size, a.qkv_bias, std)
            self.qkv = GroupedLinear(self, "wq", "wk", "wv")
        self.wo = make_linear(a, q_size, a.hidden_size, a.o_bias, a.init.attention_other, into_residual=True)
        self.fused = a.fused_qkv
        self.qk_norm = a.qk_norm
        if a.qk_norm:
            self.q_norm = RMSNorm(a.head_dim, a.norm_eps, a.norm_dtype, fused_kernels=a.fused_kernels)
            self.k_norm = RMSNorm(a.head_dim, a.norm_eps, a.norm_dtype, fused_kernels=a.fused_kernels)

    def use_local_heads(self, heads: HeadShape) -> None:
        """Expect projections whose outputs have these heads instead of all of the layer's."""
        self.group_size = heads.num_heads // heads.num_kv_heads

    def forward(
        self, x: Tensor, rotary: RotaryTables, varlen: VarlenMetadata | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """`[B, S, h]` -> `[B, S, h]`."""
        q, k, v = self._project(x, self.inner.local_rotary(rotary))
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        return self.wo(self.inner(q, k, v, varlen).flatten(2))

    def _project(self, x: Tensor, rotary: RotaryTables) -> tuple[Tensor, Tensor, Tensor]:
        # Lengths are read off the projections too: they may gather a sequence that is split over ranks.
        projected = self.qkv(x)
        if self.fused:
            qkv = projected[0].unflatten(-1, (-1, self.group_size + 2, self.head_dim))
            if not self.qk_norm:
                return split_rotary(qkv, rotary)
            q, k, v = qkv[:, :, :, :-2].flatten(2, 3), qkv[:, :, :, -2], qkv[:, :, :, -1]
        else:
            q, k, v = (out.unflatten(-1, (-1, self.head_dim)) for out in projected)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return apply_rotary(q, rotary), apply_rotary(k, rotary), v
