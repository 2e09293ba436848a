"""What a decoder layer keeps for backward, in bytes, and computes again there, in floating-point operations.

Arithmetic over dimensions and layout, without storage or processes; the formulas are those of doc/memory.md, and
tests/estimate/test_activation_memory.py holds them against what is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from internlm.core.context.layout import ParallelLayout
from internlm.model.architecture import Architecture
from internlm.model.recompute import SavePolicy

_FLOAT32 = 4


@dataclass(frozen=True)
class LayerSizes:
    """One layer on one rank.

    Args:
        architecture: of the model.
        layout: of all ranks.
        tokens: of a micro batch, before they are split over ranks.
        row_length: tokens of a row, which is as far as attention looks.
    """

    architecture: Architecture
    layout: ParallelLayout
    tokens: int
    row_length: int

    def kept_bytes(self, keep: SavePolicy) -> float:
        """Bytes that a layer keeps of one micro batch, under a policy.

        As kernels that keep the softmax's statistics do; those by blocks on the CPU keep none.
        """
        a, t, size = self.architecture, self.layout.tensor, self.architecture.dtype.itemsize
        residual = a.hidden_size / self._residual_split * (_FLOAT32 if a.residual_in_fp32 else size)
        if keep == "nothing":
            return self.tokens * residual
        attention = a.num_heads * (a.head_dim * size + _FLOAT32) / t
        if keep == "attention":
            return self.tokens * (residual + attention)
        if keep == "matmuls":
            kv_heads = a.num_kv_heads if self.layout.is_isp else max(a.num_kv_heads, t)
            columns = ((a.num_heads + 2 * kv_heads) * a.head_dim + 2 * a.intermediate_size) / t
            # Only isp's row layers give a part of the tokens; those of the other modes give a share of a sum.
            rows = 2 * a.hidden_size / (t if self.layout.is_isp else 1)
            return self.tokens * (residual + attention + (columns + rows) * size)
        kv_heads = max(a.num_kv_heads, t)
        statistics = (2 if a.norm_type == "layernorm" else 1) * _FLOAT32
        inputs = 2 * a.hidden_size / (1 if self.layout.mode == "msp" else self._residual_split) * size
        inner = ((a.num_heads + 2 * kv_heads) * a.head_dim + 3 * a.intermediate_size) / t * size
        if self.layout.is_isp and t > 1:
            # Attention's output is kept by attention and, behind an exchange, by wo.
            inner += a.num_heads * a.head_dim / t * size
        if a.qk_norm:
            # The projection, behind which values lie, is kept beside what the norms make of it.
            heads = (a.num_heads + kv_heads) / t
            inner += heads * (a.head_dim * size + _FLOAT32)
            inner += a.num_heads / t * a.head_dim * size if a.fused_qkv else 0
        return self.tokens * (2 * residual + inputs + 2 * statistics / self._residual_split + inner + attention)

    def flops_again(self, keep: SavePolicy, window: int | None) -> float:
        """Floating-point operations of matrix products that backward runs a second time.

        Args:
            window: of the layer.
        """
        a = self.architecture
        if keep in ("everything", "matmuls"):
            return 0.0
        projections = a.hidden_size * (2 * a.num_heads + 2 * a.num_kv_heads) * a.head_dim
        products = 2.0 * self.tokens * (projections + 3 * a.hidden_size * a.intermediate_size) / self.layout.tensor
        if keep == "attention":
            return products
        width = min(window or self.row_length, self.row_length)
        keys = width - width**2 / (2 * self.row_length)
        return products + 4.0 * self.tokens * a.num_heads * a.head_dim * keys / self.layout.tensor

    @property
    def _residual_split(self) -> int:
        """Ranks over which the tokens of the residual stream are split."""
        return 1 if self.layout.mode == "mtp" else self.layout.tensor
