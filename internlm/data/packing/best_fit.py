"""Best-fit decreasing bin packing of lengths (Ding et al. 2024, "Fewer Truncations Improve Language Modeling").

A pure function of the lengths: the same bins on every machine. Pieces of equal length are placed together, so that the
cost in Python grows with the number of distinct lengths rather than with that of pieces.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np
from numpy.typing import NDArray


def pack_best_fit(lengths: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """Assign each length to a bin: the longest first, each to the fullest bin with enough space.

    Args:
        lengths: int64 [n], each in [1, capacity].
        capacity: size of a bin.

    Returns:
        The bin of each length: int64 [n], numbered from 0 without gaps.
    """
    result = np.empty(len(lengths), dtype=np.int64)
    by_length = np.argsort(-lengths, kind="stable")
    borders = np.flatnonzero(np.diff(lengths[by_length])) + 1
    bins = _OpenBins(capacity)
    for pieces in np.split(by_length, borders) if len(lengths) else []:
        length = int(lengths[pieces[0]])
        placed = 0
        while placed < len(pieces):
            # The fullest bin that can take a piece remains the fullest such bin until it can take no further one.
            chosen, space = bins.take(length, len(pieces) - placed)
            per_bin = space // length
            stop = min(placed + per_bin * len(chosen), len(pieces))
            result[pieces[placed:stop]] = np.repeat(chosen, per_bin)[: stop - placed]
            in_last = stop - placed - per_bin * (len(chosen) - 1)
            bins.put(chosen[:-1], space - per_bin * length)
            bins.put(chosen[-1:], space - in_last * length)
            placed = stop
    return result


class _OpenBins:
    """Bins with space left, by their space."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._num_bins = 0
        self._spaces: list[int] = []
        """The keys of `_bins`, sorted."""
        self._bins: dict[int, list[NDArray[np.int64]]] = {}

    def take(self, length: int, count: int) -> tuple[NDArray[np.int64], int]:
        """Remove bins of the smallest space that fits `length`, at most as many as `count` pieces need; or new ones.

        Returns:
            (bins int64 [n], the space of each).
        """
        position = bisect_left(self._spaces, length)
        if position == len(self._spaces):
            space = self._capacity
            first, self._num_bins = self._num_bins, self._num_bins - (-count // (space // length))
            available = np.arange(first, self._num_bins, dtype=np.int64)
        else:
            space = self._spaces.pop(position)
            available = np.concatenate(self._bins.pop(space))
        needed = -(-count // (space // length))
        self.put(available[needed:], space)
        return available[:needed], space

    def put(self, bins: NDArray[np.int64], space: int) -> None:
        """Add bins with `space` left; full ones are forgotten."""
        if space == 0 or len(bins) == 0:
            return
        if space not in self._bins:
            insort(self._spaces, space)
        self._bins.setdefault(space, []).append(bins)
