"""Dimensions of a decoder: the one description from which FLOPs, activations and communication are computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from internlm.model.architecture import Architecture
from internlm.model.latent_shape import LatentShape
from internlm.model.moe.settings import ExpertSettings


@dataclass(frozen=True)
class ModelDimensions:
    """The dimensions of a decoder whose layers have a gated feed-forward network (three matrices), or experts like it.

    Attributes:
        intermediate_size: width of the feed-forward network.
        vocab_size: rows of the output head; 1 for a reward model.
        windows: attention window of each layer in tokens, None for full attention; empty: full attention everywhere.
        dtype: dtype of weights and activations.
        residual_dtype: dtype of the residual stream between blocks and between pipeline stages.
        norm_type: kind of the norms, which determines what they save for backward.
        has_qk_norm: whether query and key heads are normalized.
        has_tied_head: whether the output head is the embedding.
        experts: of the expert layers; None: all feed-forward networks are dense.
        latent: of latent attention, whose queries and keys have `head_dim` channels; None: grouped-query attention.
        num_multi_token: layers that predict later tokens, each with a projection and a pass through the head.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    windows: tuple[int | None, ...] = ()
    dtype: torch.dtype = torch.bfloat16
    residual_dtype: torch.dtype = torch.bfloat16
    norm_type: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    has_qk_norm: bool = False
    has_tied_head: bool = False
    experts: ExpertSettings | None = None
    latent: LatentShape | None = None
    num_multi_token: int = 0

    @classmethod
    def of(cls, architecture: Architecture) -> ModelDimensions:
        """The dimensions of a decoder of `internlm.model`."""
        a = architecture
        return cls(
            num_layers=a.num_layers,
            hidden_size=a.hidden_size,
            num_heads=a.num_heads,
            num_kv_heads=a.num_kv_heads,
            head_dim=a.head_dim,
            intermediate_size=a.intermediate_size,
            vocab_size=1 if a.is_reward else a.vocab_size,
            windows=a.windows,
            dtype=a.dtype,
            residual_dtype=torch.float32 if a.residual_in_fp32 else a.dtype,
            norm_type=a.norm_type,
            has_qk_norm=a.qk_norm,
            has_tied_head=a.tie_word_embeddings,
            experts=a.experts,
            latent=a.latent,
            num_multi_token=a.num_multi_token,
        )

    @property
    def attention_parameters(self) -> int:
        """Elements of a layer's attention matrices: `h d (2H + 2K)`, or those of latent attention."""
        shape = self.latent
        if shape is None:
            return self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        up = self.num_heads * ((shape.q_rank or 0) * self.head_dim + shape.kv_rank * (shape.plain_dim + self.value_dim))
        direct = self.num_heads * (self.value_dim + (self.head_dim if shape.q_rank is None else 0))
        return up + self.hidden_size * (direct + self.latent_rows)

    @property
    def latent_rows(self) -> int:
        """Rows of the projections to latent vectors and to the rotary key, which are not split over tensor ranks."""
        return 0 if self.latent is None else (self.latent.q_rank or 0) + self.latent.down_rows

    @property
    def value_dim(self) -> int:
        """Channels of a value head."""
        return self.head_dim if self.latent is None else self.latent.value_dim

    @property
    def feed_forward_parameters(self) -> int:
        """Elements of the matrices of a feed-forward block that one token passes through; of an expert layer if any.

        `3 h f` of a dense one; with experts those of k experts, of the shared ones with their gate, and of the router.
        """
        e = self.experts
        if e is None:
            return self.dense_feed_forward_parameters
        gate = {"sum": 0, "sigmoid": 1, "softmax": 2}[e.shared_mix] if e.shared_width else 0
        widths = e.form.top_k * e.width + e.shared_width
        return self.hidden_size * (3 * widths + gate + e.form.num_experts)

    @property
    def dense_feed_forward_parameters(self) -> int:
        """Elements of the matrices of a dense feed-forward block, `3 h f`."""
        return 3 * self.hidden_size * self.intermediate_size

    @property
    def layer_parameters(self) -> int:
        """Elements of a layer's matrices that one token passes through, an expert layer if any: no norms, no biases."""
        return self.attention_parameters + self.feed_forward_parameters

    @property
    def joining_parameters(self) -> int:
        """Elements of the projection of hidden states and embeddings in a layer that predicts a later token."""
        return 2 * self.hidden_size**2

    @property
    def head_parameters(self) -> int:
        """Elements of the output head."""
        return self.hidden_size * self.vocab_size

    @property
    def gemm_parameters(self) -> int:
        """Elements of all matrices that every token passes through: no embedding (a lookup), norms or biases."""
        dense_layers = self.experts.dense_layers if self.experts else frozenset()
        one_dense = self.attention_parameters + self.dense_feed_forward_parameters
        layers = (self.num_layers - len(dense_layers)) * self.layer_parameters + len(dense_layers) * one_dense
        last = one_dense if self.num_layers - 1 in dense_layers else self.layer_parameters
        later = self.num_multi_token * (last + self.joining_parameters + self.head_parameters)
        return layers + self.head_parameters + later

    def predicts_later_token(self, layer: int) -> bool:
        """Whether a layer is behind those of the model; all that it shares with other layers is as in the last one."""
        return layer >= self.num_layers

    def has_experts(self, layer: int) -> bool:
        """Whether the feed-forward block of a layer routes tokens to experts."""
        return self.experts is not None and self._like(layer) not in self.experts.dense_layers

    def window(self, layer: int) -> int | None:
        """Attention window of a layer in tokens; None for full attention."""
        return self.windows[self._like(layer)] if self.windows else None

    def _like(self, layer: int) -> int:
        return min(layer, self.num_layers - 1)
