"""The order of items that mixes a few files at a time."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from internlm.data.file_windows import FileWindows


@pytest.mark.parametrize("num_files", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("sizes", [[5, 0, 3, 8, 1, 0, 9], [4], [0, 0, 6], [100, 1, 1]])
def test_every_epoch_has_each_item_once(sizes: list[int], num_files: int) -> None:
    windows = FileWindows(sizes, num_files, seed=3)
    for epoch in (0, 1, 7):
        items = windows.items(epoch, np.arange(sum(sizes)))
        assert sorted(items.tolist()) == list(range(sum(sizes)))
        # One place at a time, backwards, as another process would.
        alone = [
            int(FileWindows(sizes, num_files, 3).items(epoch, np.array([place]))[0]) for place in range(sum(sizes))
        ]
        assert alone == items.tolist()


def test_a_window_has_the_items_of_its_files_alone() -> None:
    sizes = np.random.default_rng(0).integers(1, 20, 23)
    ends = np.cumsum(sizes)
    windows = FileWindows(sizes, 4, seed=5)
    for epoch in range(3):
        owners = np.searchsorted(ends, windows.items(epoch, np.arange(ends[-1])), side="right").tolist()
        numbers = [windows.window_at(epoch, place) for place in range(ends[-1])]
        assert numbers == sorted(numbers) and set(numbers) == set(range(6))
        for window in set(numbers):
            files = {owner for owner, number in zip(owners, numbers, strict=True) if number == window}
            assert len(files) == (4 if window < 5 else 3)
            assert files <= set(windows.files_from(epoch, window)[:4])
        # Files of a window are mixed, not read one after the other.
        first = owners[: numbers.count(0)]
        assert sum(a != b for a, b in pairwise(first)) > len(first) // 3


def test_the_next_window_follows_also_into_the_next_epoch() -> None:
    windows = FileWindows([3] * 10, 4, seed=1)
    for epoch, window in ((0, 0), (0, 1), (0, 2), (1, 2)):
        following = (epoch, window + 1) if window < 2 else (epoch + 1, 0)
        own = windows.files_from(epoch, window)
        count = 4 if window < 2 else 2
        expected = own[:count] + windows.files_from(*following)[: 4 if following[1] < 2 else 2]
        assert own == list(dict.fromkeys(expected))


def test_epochs_and_seeds_differ() -> None:
    orders = {
        tuple(FileWindows([6] * 8, 2, seed).items(epoch, np.arange(48)).tolist()) for seed in (0, 1) for epoch in (0, 1)
    }
    assert len(orders) == 4


def test_windows_and_epochs_of_one_file_have_orders_of_their_own() -> None:
    """The order within a window is not that of another one, nor that of the same files in another epoch."""
    sizes = [30] * 4
    windows = FileWindows(sizes, 1, seed=2)
    orders = [
        tuple((windows.items(epoch, np.arange(120)) % 30)[start : start + 30].tolist())
        for epoch in range(3)
        for start in range(0, 120, 30)
    ]
    assert len(set(orders)) == 12
