"""The attention block of a decoder layer: projections, query and key norms, rotary embedding, cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from internlm.model.modules.cache import KeyValueCache
from internlm.model.modules.linear import make_linear
from internlm.model.modules.norm import RMSNorm
from internlm.model.ops.attention.causal_attention import VarlenMetadata, attention
from internlm.model.ops.rotary import RotaryTables, apply_rotary, split_rotary
from internlm.model.roles import HeadShape

if TYPE_CHECKING:
    from internlm.model.architecture import Architecture


class Attention(nn.Module):
    """Grouped-query attention. H query heads, K key-value heads, g = H / K, D head dimension.

    The fused projection `wqkv` has its rows by key-value group: g query heads, then the group's key, then its value.
    Head counts are read off the projections' outputs, so a rank that holds some of the groups runs the same code.
    """

    def __init__(self, architecture: Architecture, layer: int) -> None:
        super().__init__()
        a = architecture
        self.layer = layer
        self.head_dim = a.head_dim
        self.group_size = a.num_heads // a.num_kv_heads
        self.window = a.windows[layer]
        self.attention_backend = a.attention_backend
        self.use_flash_attn = a.use_flash_attn
        q_size, kv_size = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
        std = a.init.attention_wqkv
        if a.fused_qkv:
            self.wqkv = make_linear(a, a.hidden_size, q_size + 2 * kv_size, a.qkv_bias, std)
        else:
            self.wq = make_linear(a, a.hidden_size, q_size, a.qkv_bias, std)
            self.wk = make_linear(a, a.hidden_size, kv_size, a.qkv_bias, std)
            self.wv = make_linear(a, a.hidden_size, kv_size, a.qkv_bias, std)
        self.wo = make_linear(a, q_size, a.hidden_size, a.o_bias, a.init.attention_other, into_residual=True)
        self.fused = a.fused_qkv
        self.qk_norm = a.qk_norm
        if a.qk_norm:
            self.q_norm = RMSNorm(a.head_dim, a.norm_eps, a.norm_dtype, fused_kernels=a.fused_kernels)
            self.k_norm = RMSNorm(a.head_dim, a.norm_eps, a.norm_dtype, fused_kernels=a.fused_kernels)

    def use_local_heads(self, heads: HeadShape) -> None:
        """Expect projections that give these heads instead of all of the model's."""
        self.group_size = heads.num_heads // heads.num_kv_heads

    def forward(
        self, x: Tensor, rotary: RotaryTables, varlen: VarlenMetadata | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """`[B, S, h]` -> `[B, S, h]`."""
        q, k, v = self._project(x, rotary)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        out = attention(
            q,
            k,
            v,
            varlen,
            window=self.window,
            attention_backend=self.attention_backend,
            use_flash_attn=self.use_flash_attn,
        )
        return self.wo(out.flatten(2))

    def _project(self, x: Tensor, rotary: RotaryTables) -> tuple[Tensor, Tensor, Tensor]:
        # Lengths are read off the projections too: they may gather a sequence that is split over ranks.
        if self.fused:
            qkv = self.wqkv(x).unflatten(-1, (-1, self.group_size + 2, self.head_dim))
            if not self.qk_norm:
                return split_rotary(qkv, rotary)
            q, k, v = qkv[:, :, :, :-2].flatten(2, 3), qkv[:, :, :, -2], qkv[:, :, :, -1]
        else:
            q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return apply_rotary(q, rotary), apply_rotary(k, rotary), v
