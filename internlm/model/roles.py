"""What a weight is in the architecture: all that a parallel mode needs to know of a model.

A model carries `roles`, a mapping from glob patterns over module names to a `Role`, for example
`{"layers.*.attention.wqkv": Role.COLUMN_BY_KV_GROUP, "layers.*.attention.wo": Role.ROW}`. A module that no pattern
matches is REPLICATED. The model knows nothing else of parallelism.
"""

from __future__ import annotations

import enum


class Role(enum.Enum):
    """How a module's weight may be split over the tensor axis."""

    REPLICATED = "replicated"
    """Every rank holds it whole: norms, gates."""
    COLUMN = "column"
    """Split on the output dimension: w1, w3, separate wq."""
    COLUMN_PAIR = "column_pair"
    """Two column weights stacked on the output dimension, each half split on its own: fused w13."""
    COLUMN_BY_KV_GROUP = "column_by_kv_group"
    """Split on the output dimension in whole key-value groups: fused wqkv, wk, wv."""
    ROW = "row"
    """Split on the input dimension: wo, w2."""
    EMBEDDING = "embedding"
    """Token embedding `[V, h]`: split on vocabulary or on hidden."""
    HEAD = "head"
    """Output head `[V, h]`: split on vocabulary."""
