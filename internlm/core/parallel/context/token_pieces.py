"""The pieces into which a cut divides documents, and which keys the queries of each piece see. Arrays, no loops.

A piece is the part of an owned range that lies in one document. Pieces are ordered as in the sample, so the keys that a
piece sees are in itself, causally, and in the pieces before it in its document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from internlm.core.parallel.context.token_cut import TokenCut

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class TokenPieces:
    """The P pieces of a sample, in order; all arrays are int64 `[P]`.

    Attributes:
        num_ranks: number of context ranks.
        rank: the owner.
        start, stop: tokens of the sample.
        local: the position of `start` among the tokens of the owner.
        document: number of the document.
        first: index of the first piece of the document.
        end: index behind the last piece of the document.
    """

    num_ranks: int
    rank: Integers
    start: Integers
    stop: Integers
    local: Integers
    document: Integers
    first: Integers
    end: Integers

    @classmethod
    def of(cls, lengths: Sequence[int], cut: TokenCut) -> TokenPieces:
        """The pieces of documents of these lengths."""
        ranges = sorted((stop, rank) for rank, owned in enumerate(cut.ranges) for _, stop in owned)
        range_stops, range_ranks = (np.array(column, dtype=np.int64) for column in zip(*ranges, strict=True))
        document_stops = np.cumsum(np.asarray(lengths, dtype=np.int64))
        stops = np.union1d(range_stops, document_stops[document_stops > 0])
        starts = np.concatenate([[0], stops[:-1]])
        rank = range_ranks[np.searchsorted(range_stops, stops)]
        # Empty documents have no piece: the first document that ends at or behind a piece's end has it.
        document = np.searchsorted(document_stops, stops)
        local = np.empty_like(starts)
        for own in range(cut.num_ranks):
            sizes = (stops - starts)[rank == own]
            local[rank == own] = np.cumsum(sizes) - sizes
        _, first, number = np.unique(document, return_index=True, return_inverse=True)
        end = np.append(first[1:], len(stops))
        return cls(cut.num_ranks, rank, starts, stops, local, document, first[number], end[number])

    def __len__(self) -> int:
        return len(self.rank)

    def work(self, window: int | None) -> tuple[Integers, Integers]:
        """By rank, the number of visible pairs of query and key, and of tiles, int64 `[c]` each."""
        document_start = self.start[self.first]
        pairs = _pairs_before(self.stop - document_start, window) - _pairs_before(self.start - document_start, window)
        if window is None:
            tiles = np.arange(len(self)) - self.first + 1
        else:
            reached = np.searchsorted(self.stop, self.start - window + 1, side="right")
            tiles = np.arange(len(self)) - np.maximum(reached, self.first) + 1
        sums = [np.bincount(self.rank, weights, self.num_ranks).astype(np.int64) for weights in (pairs, tiles)]
        return sums[0], sums[1]

    def needed(self) -> NDArray[np.bool_]:
        """`[c, c]`: whether keys of the first rank are before queries of the second in any document."""
        documents = int(self.document.max()) + 1
        earliest = np.full((documents, self.num_ranks), len(self))
        latest = np.full((documents, self.num_ranks), -1)
        pieces = np.arange(len(self))
        np.minimum.at(earliest, (self.document, self.rank), pieces)
        np.maximum.at(latest, (self.document, self.rank), pieces)
        result = np.zeros((self.num_ranks, self.num_ranks), dtype=bool)
        for begin in range(0, documents, 1024):
            part = slice(begin, begin + 1024)
            result |= (earliest[part, :, None] < latest[part, None, :]).any(0)
        return result


def _pairs_before(count: Integers, window: int | None) -> Integers:
    """Visible pairs of the first `count` queries of a document."""
    if window is None:
        return count * (count + 1) // 2
    ramp = np.minimum(count, window)
    return ramp * (ramp + 1) // 2 + np.maximum(count - window, 0) * window


def ranges_between(first: Integers, stop: Integers) -> tuple[Integers, Integers]:
    """All pairs (i, j) with first[i] <= j < stop[i], by i, as two arrays."""
    counts = stop - first
    i = np.repeat(np.arange(len(counts)), counts)
    offset = np.arange(len(i)) - np.repeat(np.cumsum(counts) - counts, counts)
    return i, first[i] + offset
