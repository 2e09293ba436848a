"""Roles of weights in the architecture: all that a parallel mode needs to know about a model.

A model has an attribute `roles`, a mapping from glob patterns over module names to a `Role`, for example
`{"layers.*.attention.wqkv": Role.ATTENTION_QKV, "layers.*.feed_forward.w2": Role.ROW}`, and `heads`, a `HeadShape`,
if it has attention. A module that no pattern matches is REPLICATED. The model knows nothing else about parallelism.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Role(enum.Enum):
    """How a module's weight may be split over the tensor axis."""

    REPLICATED = "replicated"
    """Not split; applied to the residual stream: norms, gates."""
    PER_HEAD = "per_head"
    """Not split; every rank applies it to its own heads: norms of queries and keys."""
    PER_IMAGE = "per_image"
    """Not split; every rank applies it to its own pictures: vision towers and their projectors."""
    PER_QUERY_CHANNEL = "per_query_channel"
    """Vector ordered by query head, split between query heads; not a linear layer: norms of whole q projections,
    attention sinks."""
    PER_KV_CHANNEL = "per_kv_channel"
    """Likewise by key-value head: norms of whole k projections."""
    COLUMN = "column"
    """Split on the output dimension: w1, w3."""
    COLUMN_PAIR = "column_pair"
    """Two column weights stacked on the output dimension, each half split separately: fused w13."""
    ROW = "row"
    """Split on the input dimension: w2."""
    COLUMN_TO_RESIDUAL = "column_to_residual"
    """Split on the output dimension, whose parts are joined to the residual stream: projections into it."""
    ATTENTION_QKV = "attention_qkv"
    """Output dimension ordered by key-value group (its queries, key and value), split between groups: fused wqkv."""
    ATTENTION_Q = "attention_q"
    """Output dimension split between query heads: wq."""
    ATTENTION_KV = "attention_kv"
    """Output dimension split between key-value heads: wk, wv."""
    ATTENTION_OUT = "attention_out"
    """Input dimension split between query heads: wo."""
    LATENT = "latent"
    """Not split over the tensor axis; applied to the residual stream. A linear layer whose outputs are inputs of column
    layers: wq_a, wkv_a. Modes that gather weights shard it as they do any linear layer."""
    EMBEDDING = "embedding"
    """Token embedding `[V, h]`: split on vocabulary or on hidden."""
    ROUTER = "router"
    """Weight of a router, `[E, h]`: not split; applied to the tokens of the residual stream, or to a part of them."""
    EXPERTS = "experts"
    """Weights of all experts of a layer, `[E, ...]`: dealt to the ranks of the expert axis."""
    HEAD = "head"
    """Output head `[V, h]`: split on vocabulary."""


@dataclass(frozen=True)
class HeadShape:
    """The heads of a model's attention.

    Attributes:
        num_heads: query heads.
        num_kv_heads: key-value heads; `num_heads` is a multiple of it.
        head_dim: channels of a head.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
