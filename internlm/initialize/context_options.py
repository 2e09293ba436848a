"""The options of context parallelism, from the config."""

from __future__ import annotations

from internlm.config.schema import ParallelConfig
from internlm.core.context.ring_order import ring_order
from internlm.core.parallel.context.split_batch import ContextOptions


def context_options(parallel: ParallelConfig) -> ContextOptions:
    """How context ranks share the attention of a sample, from `parallel.context` or `parallel.sequence_2D`."""
    windows: list[list[int]] = []
    if parallel.context_window > 1:
        is_interleaved = parallel.sequence_2D.enable and parallel.sequence_2D.device_placement_strategy.interleaved
        windows = ring_order(parallel.context_ranks, parallel.context_window, is_interleaved)
    return ContextOptions(parallel.context.cut, parallel.context.exchange, tuple(map(tuple, windows)))
