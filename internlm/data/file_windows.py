"""An order of the items of files that reads a few files at a time, for data that the local disk cannot hold.

In each epoch the files are in a pseudo-random order and cut into windows of W files; the items of a window are in
pseudo-random order. The item at a place is a pure function of (sizes of the files, seed, W, epoch, place).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from internlm.data.permutation import derive_key, permute


class FileWindows:
    """The order of items 0, 1, ..., which are numbered file after file.

    Args:
        sizes: items of each file: int [files], at least one item together.
        num_files: files of a window, W above.
        seed: of the order.
    """

    def __init__(self, sizes: ArrayLike, num_files: int, seed: int) -> None:
        self._sizes = np.asarray(sizes, dtype=np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._num_files, self._seed = num_files, seed
        self._epoch = -1

    def items(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The items at places of an epoch: int64 of the same shape [n]."""
        self._arrange(epoch)
        found = np.empty_like(places)
        windows = np.searchsorted(self._window_ends, places, side="right")
        for window in np.unique(windows):
            here = windows == window
            start = int(self._window_ends[window - 1]) if window else 0
            size = int(self._window_ends[window]) - start
            key = derive_key(self._seed, epoch, 2, int(window))
            shuffled = start + permute(places[here] - start, size, key)
            positions = np.searchsorted(self._ends, shuffled, side="right")
            files = self._files[positions]
            found[here] = self._starts[files] + shuffled - (self._ends[positions] - self._sizes[files])
        return found

    def window_at(self, epoch: int, place: int) -> int:
        """The window of a place of an epoch."""
        self._arrange(epoch)
        return int(np.searchsorted(self._window_ends, place, side="right"))

    def files_from(self, epoch: int, window: int) -> list[int]:
        """The files of a window, and those of the next one, which may be of the next epoch."""
        self._arrange(epoch)
        first = window * self._num_files
        files = self._files[first : first + 2 * self._num_files].tolist()
        if first + self._num_files >= len(self._files):
            files += self._shuffled(epoch + 1)[: self._num_files].tolist()
        return list(dict.fromkeys(files))

    def _arrange(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        self._epoch = epoch
        self._files = self._shuffled(epoch)
        # In this order, the end of each file among the items of the epoch, and that of each window.
        self._ends = np.cumsum(self._sizes[self._files])
        last = np.arange(self._num_files, len(self._files) + self._num_files, self._num_files)
        self._window_ends = self._ends[np.minimum(last, len(self._files)) - 1]

    def _shuffled(self, epoch: int) -> NDArray[np.int64]:
        return permute(np.arange(len(self._sizes)), len(self._sizes), derive_key(self._seed, epoch, 1))
