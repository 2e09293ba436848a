"""Activations that a decoder layer saves for backward, in bytes, and its recomputation, in FLOPs.

The formulas are those of doc/memory.md; tests/estimate/test_activation_memory.py compares them with the allocated
memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from internlm.core.context.layout import ParallelLayout
from internlm.estimate.dimensions import ModelDimensions
from internlm.estimate.expert_layers import RoutedTokens, expert_bytes
from internlm.estimate.flops import attention_flops_per_token
from internlm.model.recompute import SavePolicy

_FLOAT32 = 4


@dataclass(frozen=True)
class LayerActivations:
    """Activations of one layer on one rank for one micro-batch.

    Args:
        dimensions: dimensions of the model.
        layout: layout of all ranks.
        tokens: tokens of a micro-batch on the tensor ranks of one context rank.
        row_length: tokens of a row, the largest distance over which attention reaches.
        gathered_keys: attention window (None: no limit) -> tokens whose latent vectors this rank gathers over context
            ranks; empty: it gathers none.
        window: attention window of the layer; None: no limit.
        has_experts: the feed-forward block of the layer routes tokens to experts.
        predicts_later_token: the layer is one of those behind the model, which also join hidden states and embeddings.
        is_worst: all tokens of all ranks go to the experts of this rank, as far as they can; otherwise every expert
            gets equally many.
    """

    dimensions: ModelDimensions
    layout: ParallelLayout
    tokens: int
    row_length: int
    gathered_keys: Mapping[int | None, int] = field(default_factory=dict)
    window: int | None = None
    has_experts: bool = False
    predicts_later_token: bool = False
    is_worst: bool = False

    def of(self, layer: int) -> LayerActivations:
        """The activations of the layer with this number."""
        m = self.dimensions
        return replace(
            self,
            window=m.window(layer),
            has_experts=m.has_experts(layer),
            predicts_later_token=m.predicts_later_token(layer),
        )

    def saved_bytes(self, policy: SavePolicy) -> float:
        """Bytes that the layer saves for backward.

        Assumes attention kernels that save the softmax statistics; the blockwise kernel on the CPU saves none.
        """
        return self._saved_by_dense_blocks(policy) + self._saved_by_experts(policy) + self._saved_by_joining(policy)

    def _saved_by_joining(self, policy: SavePolicy) -> float:
        """Bytes of the projection of hidden states and embeddings, and of the norms around it and behind the layer."""
        if not self.predicts_later_token:
            return 0.0
        m, size, split = self.dimensions, self.dimensions.dtype.itemsize, self._residual_split
        # A recomputed layer saves its second input, too.
        hidden = m.hidden_size / split * size
        if policy in ("nothing", "attention"):
            return self.tokens * hidden
        if policy == "matmuls":
            return self.tokens * (hidden + m.hidden_size / self.layout.tensor * size)
        statistics = (2 if m.norm_type == "layernorm" else 1) * _FLOAT32
        # Inputs of three norms, of which two are residual streams, and of the projection.
        streams = hidden + 2 * m.hidden_size / split * m.residual_dtype.itemsize
        joined = 2 * m.hidden_size / (1 if self.layout.mode == "msp" else split) * size
        return self.tokens * (streams + 3 * statistics / split + joined)

    def _saved_by_experts(self, policy: SavePolicy) -> float:
        """Bytes of the router and the routed experts, and of the sum of their outputs with that of shared ones."""
        if not self.has_experts:
            return 0.0
        routed = RoutedTokens.of(self.dimensions, self.layout, self.tokens)
        residual_tokens = self.tokens / self._residual_split
        return expert_bytes(self.dimensions, self.layout, routed, residual_tokens, policy, is_worst=self.is_worst)

    @property
    def _width(self) -> int:
        """Width of the dense feed-forward network, or of the shared experts in its place; 0: there are none."""
        experts = self.dimensions.experts
        return experts.shared_width if self.has_experts and experts else self.dimensions.intermediate_size

    @property
    def _num_blocks(self) -> int:
        """Attention, and the dense feed-forward network if there is one."""
        return 2 if self._width else 1

    def _saved_by_dense_blocks(self, policy: SavePolicy) -> float:
        """Bytes of the layer without its routed experts."""
        m, t, size = self.dimensions, self.layout.tensor, self.dimensions.dtype.itemsize
        residual = m.hidden_size / self._residual_split * m.residual_dtype.itemsize
        # Kernels compute with heads of one width, but those over context ranks.
        is_over_ranks = self.layout.context > 1
        width = m.value_dim if is_over_ranks else max(m.head_dim, m.value_dim)
        attention = m.num_heads * (width * size + _FLOAT32) / t
        if policy == "nothing" and not is_over_ranks:
            return self.tokens * residual
        # Attention that exchanges keys is never recomputed.
        if policy in ("nothing", "attention"):
            return self.tokens * (residual + attention)
        if policy == "matmuls":
            kv_heads = m.num_kv_heads if self.layout.is_isp else max(m.num_kv_heads, t)
            if m.latent is None:
                projected = (m.num_heads + 2 * kv_heads) * m.head_dim / t
            else:
                by_head = m.head_dim + self._keys_per_token * (m.latent.plain_dim + m.value_dim)
                projected = m.latent_rows / self._residual_split + m.num_heads * by_head / t
            columns = projected + 2 * self._width / t
            # Row layers of isp output a shard of the tokens; those of the other modes a partial sum for all tokens.
            rows = self._num_blocks * m.hidden_size / (t if self.layout.is_isp else 1)
            return self.tokens * (residual + attention + (columns + rows) * size)
        kv_heads = max(m.num_kv_heads, t)
        if m.latent is not None:
            return self._saved_bytes_of_latent(residual, attention)
        statistics = (2 if m.norm_type == "layernorm" else 1) * _FLOAT32
        inputs = self._num_blocks * m.hidden_size / (1 if self.layout.mode == "msp" else self._residual_split) * size
        inner = ((m.num_heads + 2 * kv_heads) * m.head_dim + 3 * self._width) / t * size
        if self.layout.is_isp and t > 1:
            # The output of attention is saved by attention and, after the all-to-all, by wo.
            inner += m.num_heads * m.head_dim / t * size
        if m.has_qk_norm:
            # Queries and keys are saved before and after their norms.
            heads = (m.num_heads + kv_heads) / t
            inner += heads * (m.head_dim * size + _FLOAT32)
        return self.tokens * (2 * residual + inputs + 2 * statistics / self._residual_split + inner + attention)

    def _saved_bytes_of_latent(self, residual: float, attention: float) -> float:
        """Bytes that a layer with latent attention saves for backward.

        Args:
            residual: bytes of the residual stream, per token.
            attention: bytes of the output and the statistics of the attention kernel, per token.
        """
        m, t, size, split = self.dimensions, self.layout.tensor, self.dimensions.dtype.itemsize, self._residual_split
        shape = m.latent
        assert shape is not None
        gathered = 1 if self.layout.mode == "msp" else split
        # Of the projections to latent vectors and of the feed-forward network; direct queries gather theirs.
        inputs = m.hidden_size * (1 / split + (self._num_blocks - 1) / gathered)
        if shape.q_rank is None and gathered != split:
            inputs += m.hidden_size / gathered
        # Latent vectors before and behind their norms, which save a number for each token.
        inputs += m.latent_rows / split + (shape.q_rank or 0) / gathered
        num_norms = 3 if shape.q_rank is None else 4
        gathers_keys, keys = self.layout.gathers_latents, self._keys_per_token
        # The gathered ones with their rotary keys.
        inputs += keys * (shape.kv_rank + shape.rotary_dim) if gathers_keys else shape.kv_rank / gathered
        # Queries, keys and values as the kernel gets them, with heads of one width; values are a view of a projection.
        width = max(m.head_dim, m.value_dim)
        is_over_ranks = self.layout.context > 1
        is_cut = m.value_dim < width and not is_over_ranks
        by_head: float = 2 * width + (width if is_cut else shape.plain_dim + m.value_dim)
        if gathers_keys:
            by_head = m.head_dim + keys * (m.head_dim + shape.plain_dim + m.value_dim)
        if self.layout.is_isp and t > 1:
            # All three in the buffer of the exchange, and a copy of what is padded.
            padded = 0 if is_over_ranks or m.head_dim == m.value_dim else width if is_cut else 2 * width
            by_head = 2 * m.head_dim + m.value_dim + padded
        if is_cut or (self.layout.is_isp and t > 1):
            # The input of wo is another tensor than the output of the kernel.
            by_head += m.value_dim
        inner = (m.num_heads * by_head + 3 * self._width) / t
        return self.tokens * (2 * residual + (inputs + inner) * size + num_norms * _FLOAT32 / split + attention)

    @property
    def _keys_per_token(self) -> float:
        """Tokens whose keys and values this rank has, those that it gathers from other context ranks included."""
        return self.gathered_keys.get(self.window, self.tokens) / self.tokens

    def recomputed_flops(self, policy: SavePolicy, window: int | None) -> float:
        """FLOPs of the GEMMs and of attention that backward recomputes.

        Args:
            policy: save policy of the layer.
            window: attention window of the layer; None for full attention.
        """
        if policy in ("everything", "matmuls"):
            return 0.0
        m, t = self.dimensions, self.layout.tensor
        matrices = m.attention_parameters + 3 * m.hidden_size * self._width
        if m.latent is not None:
            by_head = m.latent.kv_rank * (m.latent.plain_dim + m.value_dim)
            matrices += round((self._keys_per_token - 1) * m.num_heads * by_head)
        if self.predicts_later_token:
            matrices += m.joining_parameters
        gemms = 2.0 * self.tokens * matrices / t
        if self.has_experts:
            routed = m.feed_forward_parameters - 3 * m.hidden_size * self._width
            gemms += 2.0 * RoutedTokens.of(m, self.layout, self.tokens).tokens * routed
        if self.layout.mode == "mtp":
            # Every rank computes the latent vectors of all tokens.
            gemms += 2.0 * self.tokens * m.hidden_size * m.latent_rows * (1 - 1 / t)
        if policy == "attention" or self.layout.context > 1:
            return gemms
        attention = attention_flops_per_token(self.dimensions, self.row_length, window, "causal")
        return gemms + self.tokens * attention / self.layout.tensor

    @property
    def _residual_split(self) -> int:
        """Ranks over which the tokens of the residual stream are split."""
        return 1 if self.layout.mode == "mtp" else self.layout.tensor
