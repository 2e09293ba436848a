"""Reads rows of Arrow IPC files and streams by number, memory-mapped; `datasets` saves and caches such streams."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internlm.data.remote.local_file import keep_open
from internlm.data.rows.file_version import check_version, version_of_file
from internlm.data.rows.parquet_rows import value_at
from internlm.data.rows.row_file import checked_row, missing_column
from internlm.data.rows.row_starts import kept_starts
from internlm.utils.errors import DataError
from internlm.utils.logging import get_logger

_FILE_MAGIC = b"ARROW1"
_MAX_DECOMPRESSED = 64 * 2**20

logger = get_logger(__name__)


class ArrowRows:
    """Random access to the rows of an Arrow IPC file or stream.

    Args:
        path: the file.
        columns: to read; None: all.

    Raises:
        DataError: no such file.
    """

    block_starts: NDArray[np.int64] | None = None

    def __init__(self, path: str | Path, columns: Sequence[str] | None = None) -> None:
        self.path = Path(path)
        self._columns = None if columns is None else list(columns)
        self._version = version_of_file(self.path)
        self._key = ("arrow", str(self.path), self._version.size, self._version.mtime_ns)
        self._starts: NDArray[np.int64] | None = None

    @property
    def inputs(self) -> Sequence[Path]:
        """The file."""
        return (self.path,)

    @property
    def reading(self) -> str:
        """Nothing: rows have their numbers from the file alone."""
        return ""

    def __len__(self) -> int:
        """Number of rows in the file."""
        return int(self._batch_starts()[-1])

    def read(self, row: int) -> dict[str, Any]:
        """Read a row.

        Raises:
            DataError: the file is damaged, a text is not UTF-8, or a column is missing; names the file and the row.
        """
        starts = self._batch_starts()
        row = checked_row(row, int(starts[-1]), self.path)
        number = int(np.searchsorted(starts, row, side="right")) - 1
        batch = self._batches()[number]
        names = batch.schema.names
        values = {}
        for name in names if self._columns is None else self._columns:
            if name not in names:
                raise missing_column(self.path, row, name, names)
            values[name] = value_at(batch.column(name), row - int(starts[number]), self.path, row, name)
        return values

    def _batch_starts(self) -> NDArray[np.int64]:
        """First row of each record batch, and the number of rows: int64 [batches + 1]."""
        if self._starts is None:
            self._starts = kept_starts(self, "batches", lambda: [batch.num_rows for batch in self._batches()])
        return self._starts

    def _batches(self) -> list[Any]:
        batches: list[Any] = keep_open(self.path, self._key, self._open)
        return batches

    def _open(self, path: Path) -> list[Any]:
        import pyarrow

        check_version(self.path, self._version)
        allocated = pyarrow.total_allocated_bytes()
        try:
            source = pyarrow.memory_map(str(path))
            is_file = source.read(len(_FILE_MAGIC)) == _FILE_MAGIC
            source.seek(0)
            if is_file:
                reader = pyarrow.ipc.open_file(source)
                batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
            else:
                batches = list(pyarrow.ipc.open_stream(source))
            # A buffer that ends outside the file would kill the process when a row is read.
            for batch in batches:
                batch.validate()
            if not is_file and not _has_end_mark(source):
                logger.warning("%s: ends without the mark of an Arrow stream's end; it may be truncated", self.path)
        except (pyarrow.ArrowException, OSError, EOFError) as error:
            raise DataError(
                f"{self.path}: not a readable Arrow file or stream ({str(error).strip()}): it may be incomplete; copy "
                "or save it again"
            ) from error
        allocated = pyarrow.total_allocated_bytes() - allocated
        if allocated > _MAX_DECOMPRESSED:
            logger.warning(
                "%s: compressed, so each worker holds it decompressed (%s bytes); save it without compression",
                self.path, f"{allocated:,}",
            )  # fmt: skip
        return batches


def _has_end_mark(source: Any) -> bool:
    """Whether a stream ends with the end-of-stream mark, of which older writers write 4 bytes; writers may omit it."""
    size = source.size()
    source.seek(max(0, size - 8))
    end = source.read(8)
    return bool(end == b"\xff\xff\xff\xff\0\0\0\0" or (size >= 4 and end[-4:] == b"\0\0\0\0"))
