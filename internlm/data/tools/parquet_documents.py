"""Parquet files of tokenized documents: a column of ids, and one of the loss mask.

Columns as in Hugging Face's tokenized data sets: `input_ids` (or `tokens`), a list of integers; `loss_mask`, optional,
a list of booleans.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internlm.utils.errors import DataError
from internlm.utils.optional_packages import why_unusable

_ID_COLUMNS = ("input_ids", "tokens")
_MASK_COLUMN = "loss_mask"
_ROWS_AT_ONCE = 256
_TOKENS_PER_ROW_GROUP = 1 << 22
_ROWS_PER_ROW_GROUP = 1 << 17


def _import_parquet() -> Any:
    if reason := why_unusable("pyarrow.parquet"):
        raise DataError(f"parquet files need pyarrow: {reason} (pip install pyarrow)")
    import pyarrow.parquet

    return pyarrow.parquet


def read_parquet(path: Path) -> Iterator[tuple[NDArray[np.int64], NDArray[np.bool_]]]:
    """Read the documents of a file, a few rows at a time: (ids int64 [n], loss_mask bool [n]).

    Raises:
        DataError: the file is malformed, or lacks the columns.
    """
    parquet = _import_parquet()
    try:
        file = parquet.ParquetFile(path)
    except Exception as error:
        raise DataError(f"{path}: not a complete parquet file ({error}); copy it again") from error
    with file:
        names = file.schema_arrow.names
        column = next((name for name in _ID_COLUMNS if name in names), None)
        if column is None:
            raise DataError(
                f"{path}: no column {' or '.join(_ID_COLUMNS)} among {names}; text is tokenized by tools/tokenizer.py"
            )
        columns = [column, *([_MASK_COLUMN] if _MASK_COLUMN in names else [])]
        row = 0
        for batch in file.iter_batches(_ROWS_AT_ONCE, columns=columns):
            values = [batch.column(index).to_pylist() for index in range(len(columns))]
            for cells in zip(*values, strict=True):
                yield _document(path, row, *cells)
                row += 1


def _document(path: Path, row: int, ids: Any, mask: Any = None) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    array = np.asarray(ids if ids else [], dtype=None if ids else np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(f"{path}: row {row} is not a list of integers; tokenize the source again")
    learned = np.ones(len(array), dtype=np.bool_) if mask is None else np.asarray(mask, dtype=np.bool_)
    if learned.shape != array.shape:
        raise DataError(f"{path}: row {row} has {len(array)} ids, but a {_MASK_COLUMN} of {len(learned)}")
    return array.astype(np.int64), learned


class ParquetWriter:
    """Writes documents in a context, in row groups of bounded size; the file gets its name at the end.

    Raises:
        DataError: pyarrow is missing.
    """

    def __init__(self, path: Path) -> None:
        parquet = _import_parquet()
        import pyarrow

        self.path = path
        self._arrow = pyarrow
        self._schema = pyarrow.schema(
            [("input_ids", pyarrow.list_(pyarrow.int32())), (_MASK_COLUMN, pyarrow.list_(pyarrow.bool_()))]
        )
        self._temporary = path.with_name(f".{path.name}.tmp")
        self._writer = parquet.ParquetWriter(self._temporary, self._schema)
        self._rows: list[tuple[NDArray[np.int64], NDArray[np.bool_]]] = []
        self._num_tokens = 0

    def write(self, ids: NDArray[np.int64], loss_mask: NDArray[np.bool_]) -> None:
        """Append a document."""
        self._rows.append((ids, loss_mask))
        self._num_tokens += len(ids)
        if self._num_tokens >= _TOKENS_PER_ROW_GROUP or len(self._rows) >= _ROWS_PER_ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        ids, masks = zip(*self._rows, strict=True)
        columns = [
            self._arrow.array(list(values), field.type)
            for values, field in zip((ids, masks), self._schema, strict=True)
        ]
        self._writer.write_table(self._arrow.table(columns, schema=self._schema))
        self._rows, self._num_tokens = [], 0

    def __enter__(self) -> ParquetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None and self._rows:
            self._flush()
        self._writer.close()
        if kind is not None:
            self._temporary.unlink()
            return
        os.replace(self._temporary, self.path)
