"""Best-fit decreasing against the definition, one piece at a time."""

import numpy as np
import pytest

from internlm.data.packing.best_fit import pack_best_fit


def spaces_by_definition(lengths: list[int], capacity: int) -> list[int]:
    """The space left in each bin, sorted."""
    spaces: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [number for number, space in enumerate(spaces) if space >= length]
        if fitting:
            spaces[min(fitting, key=lambda number: spaces[number])] -= length
        else:
            spaces.append(capacity - length)
    return sorted(spaces)


@pytest.mark.parametrize("capacity", [1, 2, 7, 16, 40])
def test_bins_are_those_of_the_definition(capacity: int) -> None:
    random = np.random.default_rng(capacity)
    for count in range(60):
        lengths = random.integers(1, capacity + 1, count)
        bins = pack_best_fit(lengths, capacity)
        assert bins.dtype == np.int64 and bins.shape == lengths.shape
        filled = np.bincount(bins, weights=lengths).astype(int)
        assert sorted((capacity - filled).tolist()) == spaces_by_definition(lengths.tolist(), capacity)
        assert (filled > 0).all() and (filled <= capacity).all()
        assert np.array_equal(bins, pack_best_fit(lengths.copy(), capacity))
