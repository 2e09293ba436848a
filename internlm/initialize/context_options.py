"""The options of context parallelism, and the micro-batches that its estimates assume, from the config."""

from __future__ import annotations

from internlm.config.schema import DataConfig, ParallelConfig
from internlm.core.context.layout import ParallelLayout
from internlm.core.context.ring_order import ring_order
from internlm.core.parallel.context.split_batch import ContextOptions, padded_lengths


def context_options(parallel: ParallelConfig) -> ContextOptions:
    """How context ranks share the attention of a sample, from `parallel.context` or `parallel.sequence_2D`."""
    windows: list[list[int]] = []
    if parallel.context_window > 1:
        is_interleaved = parallel.sequence_2D.enable and parallel.sequence_2D.device_placement_strategy.interleaved
        windows = ring_order(parallel.context_ranks, parallel.context_window, is_interleaved)
    return ContextOptions(parallel.context.cut, parallel.context.exchange, tuple(map(tuple, windows)))


def lengths_of_rows(data: DataConfig, layout: ParallelLayout) -> tuple[int, ...]:
    """Lengths of the documents of a micro-batch of one document a row, with the padding that context ranks add."""
    lengths = (data.seq_len,) * data.micro_bsz
    return padded_lengths(lengths, layout.context * layout.tensor) if layout.context > 1 else lengths


def tokens_per_rank(data: DataConfig, layout: ParallelLayout) -> int:
    """Tokens of a micro-batch on the tensor ranks of one context rank."""
    return sum(lengths_of_rows(data, layout)) // layout.context
