"""Reads rows of parquet files by number, a row group at a time."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internlm.data.remote.local_file import keep_open
from internlm.data.rows.file_version import check_version, version_of_file
from internlm.data.rows.process_cache import BLOCKS, MAX_BLOCK_BYTES
from internlm.data.rows.row_file import checked_row, missing_column
from internlm.data.rows.row_starts import kept_starts
from internlm.utils.errors import DataError
from internlm.utils.logging import get_logger

logger = get_logger(__name__)


class ParquetRows:
    """Random access to the rows of a parquet file.

    Args:
        path: the file.
        columns: to read; None: all.

    Raises:
        DataError: no such file.
    """

    def __init__(self, path: str | Path, columns: Sequence[str] | None = None) -> None:
        self.path = Path(path)
        self._columns = None if columns is None else tuple(columns)
        self._version = version_of_file(self.path)
        self._key = ("parquet", str(self.path), self._version.size, self._version.mtime_ns)
        self._starts: NDArray[np.int64] | None = None

    @property
    def inputs(self) -> Sequence[Path]:
        """The file."""
        return (self.path,)

    @property
    def reading(self) -> str:
        """Nothing: rows have their numbers from the file alone."""
        return ""

    @property
    def block_starts(self) -> NDArray[np.int64]:
        """First row of each row group with rows: int64 [blocks]."""
        starts = self._group_starts()
        return starts[:-1][np.diff(starts) > 0]

    def __len__(self) -> int:
        """Number of rows in the file."""
        return int(self._group_starts()[-1])

    def read(self, row: int) -> dict[str, Any]:
        """Read a row.

        Raises:
            DataError: its row group is damaged, a text is not UTF-8, or a column is missing; names file and row.
        """
        starts = self._group_starts()
        row = checked_row(row, int(starts[-1]), self.path)
        group = int(np.searchsorted(starts, row, side="right")) - 1
        table = BLOCKS.get((self._key, group, self._columns), lambda: self._read_group(group, row))
        position = row - int(starts[group])
        names = table.column_names if self._columns is None else self._columns
        return {name: value_at(table.column(name), position, self.path, row, name) for name in names}

    def _file(self) -> tuple[Any, threading.Lock]:
        """The open file, and the lock of its reader, which one thread may use at a time."""
        file: tuple[Any, threading.Lock] = keep_open(self.path, self._key, self._open)
        return file

    def _open(self, path: Path) -> tuple[Any, threading.Lock]:
        import pyarrow.parquet

        check_version(self.path, self._version)
        try:
            # Not mapped: a mapped file that is truncated while it is read kills the process.
            return pyarrow.parquet.ParquetFile(str(path), memory_map=False), threading.Lock()
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(
                f"{self.path}: not a readable parquet file ({error}): its download may be incomplete; copy it again"
            ) from error

    def _group_starts(self) -> NDArray[np.int64]:
        """First row of each row group, and the number of rows: int64 [groups + 1]."""
        if self._starts is None:
            self._starts = kept_starts(self, "row-groups", self._count_groups)
        return self._starts

    def _count_groups(self) -> list[int]:
        metadata = self._file()[0].metadata
        return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    def _read_group(self, group: int, row: int) -> Any:
        import pyarrow

        file, lock = self._file()
        names = file.schema_arrow.names
        for column in self._columns or ():
            if column not in names:
                raise missing_column(self.path, row, column, names)
        columns = None if self._columns is None else list(self._columns)
        try:
            with lock:
                # Without threads: data workers are processes, one for each core.
                table = file.read_row_group(group, columns=columns, use_threads=False)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(
                f"{self.path}: row {row}: row group {group} is damaged ({str(error).strip()}); copy the file again"
            ) from error
        if table.nbytes > MAX_BLOCK_BYTES:
            logger.warning(
                "%s: row group %d takes %s bytes, which each worker holds; shuffled reading decodes all of it "
                "again and again. Write the file with smaller row groups (pyarrow: row_group_size=1000)",
                self.path, group, f"{table.nbytes:,}",
            )  # fmt: skip
        return table


def value_at(column: Any, position: int, path: Path, row: int, name: str) -> Any:
    """The Python value at a position of a pyarrow column.

    Raises:
        DataError: a text is not UTF-8; names the file and the row.
    """
    try:
        return column[position].as_py()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: row {row}: '{name}' is not UTF-8 at its byte {error.start} ({error.reason}); write the file "
            "again from decoded text, or remove the row"
        ) from error
