"""Which cut of a sample is the fastest, by a cost model of its attention. The same answer on all ranks of a sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from internlm.core.parallel.context.token_cut import CUT_NAMES, TokenCut, cut_tokens
from internlm.core.parallel.context.token_pieces import TokenPieces

TILE_PAIRS = 128 * 128
"""The cost of starting a tile, in pairs of query and key: a tile of fewer is smaller than a block of a flash kernel."""


def choose_cut(lengths: Sequence[int], num_ranks: int, layers: Mapping[int | None, int]) -> TokenCut:
    """The cut whose slowest rank has the least work; of equals, the one that needs the fewest messages.

    Documents of different lengths call for different cuts: see `internlm.core.parallel.context.token_cut`. WLB-LLM
    (https://arxiv.org/abs/2503.17924) chooses between two of them in the same way.

    Args:
        lengths: of the documents of the sample.
        num_ranks: number of context ranks.
        layers: sliding window (None: no limit) -> number of layers that have it.
    """
    cuts = [cut_tokens(lengths, num_ranks, name) for name in CUT_NAMES]
    return min(cuts, key=lambda cut: attention_cost(TokenPieces.of(lengths, cut), layers))


def attention_cost(pieces: TokenPieces, layers: Mapping[int | None, int]) -> int:
    """Work of the slowest rank over all layers, in pairs of query and key; see `TILE_PAIRS`."""
    cost = 0
    for window, number in layers.items():
        pairs, tiles = pieces.work(window)
        cost += number * int((pairs + TILE_PAIRS * tiles).max())
    return cost
