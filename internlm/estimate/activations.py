"""Activations that a decoder layer saves for backward, in bytes, and its recomputation, in FLOPs.

The formulas are those of doc/memory.md; tests/estimate/test_activation_memory.py compares them with the allocated
memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from internlm.core.context.layout import ParallelLayout
from internlm.estimate.dimensions import ModelDimensions
from internlm.estimate.flops import attention_flops_per_token
from internlm.model.recompute import SavePolicy

_FLOAT32 = 4


@dataclass(frozen=True)
class LayerActivations:
    """Activations of one layer on one rank for one micro-batch.

    Args:
        dimensions: dimensions of the model.
        layout: layout of all ranks.
        tokens: tokens of a micro-batch, before they are split over ranks.
        row_length: tokens of a row, the largest distance over which attention reaches.
    """

    dimensions: ModelDimensions
    layout: ParallelLayout
    tokens: int
    row_length: int

    def saved_bytes(self, policy: SavePolicy) -> float:
        """Bytes that the layer saves for backward.

        Assumes attention kernels that save the softmax statistics; the blockwise kernel on the CPU saves none.
        """
        m, t, size = self.dimensions, self.layout.tensor, self.dimensions.dtype.itemsize
        residual = m.hidden_size / self._residual_split * m.residual_dtype.itemsize
        if policy == "nothing":
            return self.tokens * residual
        attention = m.num_heads * (m.head_dim * size + _FLOAT32) / t
        if policy == "attention":
            return self.tokens * (residual + attention)
        if policy == "matmuls":
            kv_heads = m.num_kv_heads if self.layout.is_isp else max(m.num_kv_heads, t)
            columns = ((m.num_heads + 2 * kv_heads) * m.head_dim + 2 * m.intermediate_size) / t
            # Row layers of isp output a shard of the tokens; those of the other modes a partial sum for all tokens.
            rows = 2 * m.hidden_size / (t if self.layout.is_isp else 1)
            return self.tokens * (residual + attention + (columns + rows) * size)
        kv_heads = max(m.num_kv_heads, t)
        statistics = (2 if m.norm_type == "layernorm" else 1) * _FLOAT32
        inputs = 2 * m.hidden_size / (1 if self.layout.mode == "msp" else self._residual_split) * size
        inner = ((m.num_heads + 2 * kv_heads) * m.head_dim + 3 * m.intermediate_size) / t * size
        if self.layout.is_isp and t > 1:
            # The output of attention is saved by attention and, after the all-to-all, by wo.
            inner += m.num_heads * m.head_dim / t * size
        if m.has_qk_norm:
            # Queries and keys are saved before and after their norms.
            heads = (m.num_heads + kv_heads) / t
            inner += heads * (m.head_dim * size + _FLOAT32)
        return self.tokens * (2 * residual + inputs + 2 * statistics / self._residual_split + inner + attention)

    def recomputed_flops(self, policy: SavePolicy, window: int | None) -> float:
        """FLOPs of the GEMMs and of attention that backward recomputes.

        Args:
            policy: save policy of the layer.
            window: attention window of the layer; None for full attention.
        """
        if policy in ("everything", "matmuls"):
            return 0.0
        gemms = 2.0 * self.tokens * self.dimensions.layer_parameters / self.layout.tensor
        if policy == "attention":
            return gemms
        attention = attention_flops_per_token(self.dimensions, self.row_length, window, "causal")
        return gemms + self.tokens * attention / self.layout.tensor

    @property
    def _residual_split(self) -> int:
        """Ranks over which the tokens of the residual stream are split."""
        return 1 if self.layout.mode == "mtp" else self.layout.tensor
