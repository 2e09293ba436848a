"""The order of the rows of files: shuffled in each epoch, and split into shards that are read one row after the other.

Rows are shuffled in units: single rows where a format reads them singly, and blocks (or parts of blocks) where reading
a row decodes its block, such as parquet's row groups. The units of an epoch are in pseudo-random order, and so are the
rows of a unit. Shard v of V has the units v, v + V, v + 2V, ... of each epoch. Nothing is stored beside the unit starts
of files with blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from internlm.data.file_windows import FileWindows
from internlm.data.permutation import derive_key, permute
from internlm.data.rows.row_file import RowFile

_MIN_UNITS_PER_SHARD = 4
"""Blocks are split until each shard has so many units."""


class RowPosition(NamedTuple):
    """Where a shard is: its epoch, the unit among its units of the epoch, and the row among the shuffled of the unit.

    A position after the last row of a unit or of an epoch is that of the next row.
    """

    epoch: int = 0
    unit: int = 0
    row: int = 0


class OrderedRow(NamedTuple):
    """A row of a shard.

    Attributes:
        position: its position in the shard.
        file, row: index of its file, and its number there.
        following: position of the next row.
    """

    position: RowPosition
    file: int
    row: int
    following: RowPosition


class ShuffledRows:
    """The rows of files in `num_shards` shards.

    Args:
        files: at least one row together.
        num_shards: fewer if there are fewer rows.
        seed: of the order.
        num_files: files whose rows are mixed at a time, see `FileWindows`; None: all.
    """

    def __init__(self, files: Sequence[RowFile], num_shards: int, seed: int, num_files: int | None = None) -> None:
        counts = [len(file) for file in files]
        self._file_starts = np.concatenate(([0], np.cumsum(counts, dtype=np.int64))).astype(np.int64)
        self.num_rows = int(self._file_starts[-1])
        self.num_shards, self._seed = max(1, min(num_shards, self.num_rows)), seed
        self._unit_starts = self._units(files, counts)
        self._num_units = self.num_rows if self._unit_starts is None else len(self._unit_starts) - 1
        self._windows: FileWindows | None = None
        if num_files is not None:
            # The first unit of each file.
            bounds = (
                self._file_starts
                if self._unit_starts is None
                else np.searchsorted(self._unit_starts, self._file_starts)
            )
            self._windows = FileWindows(np.diff(bounds), num_files, seed)

    def _units(self, files: Sequence[RowFile], counts: Sequence[int]) -> NDArray[np.int64] | None:
        """First row of each unit over all files, and the number of rows; None where each row is a unit."""
        if all(file.block_starts is None for file in files):
            return None
        largest = max(1, self.num_rows // (_MIN_UNITS_PER_SHARD * self.num_shards))
        starts = []
        for file, count, first in zip(files, counts, self._file_starts[:-1], strict=True):
            blocks = np.arange(count) if file.block_starts is None else file.block_starts
            # A file without rows has no block.
            ends = np.append(blocks, count)[1:]
            starts += [np.arange(begin, end, largest) + first for begin, end in zip(blocks, ends, strict=True)]
        return np.append(np.concatenate(starts), self.num_rows).astype(np.int64)

    def num_units_of(self, shard: int) -> int:
        """Units of a shard in one epoch; at least 1."""
        return -(-(self._num_units - shard) // self.num_shards)

    def progress(self, shard: int, position: RowPosition) -> float:
        """Epochs of a shard up to a position, by units."""
        return position.epoch + min(1.0, position.unit / self.num_units_of(shard))

    def rows(self, shard: int, position: RowPosition, count: int) -> list[OrderedRow]:
        """The next `count` rows of a shard from a position on, into the epochs that follow."""
        found: list[OrderedRow] = []
        epoch, unit, row = position
        while len(found) < count:
            if unit >= self.num_units_of(shard):
                epoch, unit, row = epoch + 1, 0, 0
            elif self._unit_starts is None:
                stop = min(unit + count - len(found), self.num_units_of(shard))
                for number, global_row in enumerate(self._shuffled_units(shard, epoch, unit, stop), unit):
                    here, following = RowPosition(epoch, number), RowPosition(epoch, number + 1)
                    found.append(OrderedRow(here, *self.locate(global_row), following))
                unit = stop
            else:
                stop = min(unit + count - len(found), self.num_units_of(shard))
                for chosen in self._shuffled_units(shard, epoch, unit, stop):
                    found += self._rows_of_unit(epoch, unit, chosen, row, count - len(found))
                    if len(found) == count:
                        break
                    unit, row = unit + 1, 0
        return found

    def _rows_of_unit(self, epoch: int, unit: int, chosen: int, start: int, count: int) -> list[OrderedRow]:
        """At most `count` rows of unit `chosen`, the shard's unit number `unit`, from its shuffled row `start` on."""
        assert self._unit_starts is not None
        first, end = int(self._unit_starts[chosen]), int(self._unit_starts[chosen + 1])
        stop = min(start + count, end - first)
        inside = np.arange(start, max(start, stop))
        if end - first > 1:
            inside = permute(inside, end - first, derive_key(self._seed, epoch, chosen, 1))
        return [
            OrderedRow(
                RowPosition(epoch, unit, number),
                *self.locate(first + int(within)),
                RowPosition(epoch, unit, number + 1),
            )
            for number, within in enumerate(inside, start)
        ]

    def _shuffled_units(self, shard: int, epoch: int, start: int, stop: int) -> list[int]:
        places = shard + self.num_shards * np.arange(start, stop, dtype=np.int64)
        if self._windows is not None:
            return [int(unit) for unit in self._windows.items(epoch, places)]
        return [int(unit) for unit in permute(places, self._num_units, derive_key(self._seed, epoch, 0))]

    def window_of(self, shard: int, position: RowPosition) -> tuple[int, int] | None:
        """(epoch, window) of a position; None without windows, and after the last row of an epoch."""
        if self._windows is None or position.unit >= self.num_units_of(shard):
            return None
        return position.epoch, self._windows.window_at(position.epoch, shard + self.num_shards * position.unit)

    def files_from(self, window: tuple[int, int]) -> list[int]:
        """The files of a window of `window_of`, and those of the next one."""
        assert self._windows is not None
        return self._windows.files_from(*window)

    def locate(self, row: int) -> tuple[int, int]:
        """(index of the file, row in it)."""
        file = int(np.searchsorted(self._file_starts, row, side="right")) - 1
        return file, row - int(self._file_starts[file])
