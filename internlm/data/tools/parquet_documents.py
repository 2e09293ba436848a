"""Parquet files of tokenized documents: a column of ids, and one of the loss mask.

Columns as in Hugging Face's tokenized data sets: `input_ids` (or `tokens`), a list of integers, and optionally what
tells tokens without loss: `loss_mask` and TRL's `assistant_masks` and `completion_mask`, 0 or 1; `labels`, the ids or
-100. A token has a loss if all that are there agree. Tokens with `attention_mask` 0 are padding, not of the document.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internlm.utils.errors import DataError
from internlm.utils.optional_packages import why_unusable

_ID_COLUMNS = ("input_ids", "tokens")
_MASK_COLUMN = "loss_mask"
_MASK_COLUMNS = (_MASK_COLUMN, "assistant_masks", "completion_mask")
_LABEL_COLUMN, _ATTENTION_COLUMN = "labels", "attention_mask"
_IGNORED_LABEL = -100
_LARGEST_ID = np.iinfo(np.int32).max
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
        others = [name for name in (*_MASK_COLUMNS, _LABEL_COLUMN, _ATTENTION_COLUMN) if name in names]
        row = 0
        for batch in file.iter_batches(_ROWS_AT_ONCE, columns=[column, *others]):
            values = {name: batch.column(name).to_pylist() for name in (column, *others)}
            for index, ids in enumerate(values[column]):
                yield _document(f"{path}: row {row}", ids, {name: values[name][index] for name in others})
                row += 1


def _document(place: str, ids: Any, others: Mapping[str, Any]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    array = _integers(place, ids, "iu")
    learned, is_text = np.ones(len(array), dtype=np.bool_), np.ones(len(array), dtype=np.bool_)
    for name, cells in others.items():
        if cells is None:
            continue  # a row without marks
        values = _integers(f"{place}, {name}", cells, "iub")
        if values.shape != array.shape:
            raise DataError(f"{place} has {len(array)} ids, but a {name} of {len(values)}")
        if name == _LABEL_COLUMN:
            is_label = values != _IGNORED_LABEL
            if (values[is_label] != array[is_label]).any():
                raise DataError(
                    f"{place}: the {name} are neither the ids nor {_IGNORED_LABEL}, as those of another column or "
                    f"shifted ones; write a column {_MASK_COLUMN} in their place"
                )
            learned &= is_label
            continue
        if ((values != 0) & (values != 1)).any():
            raise DataError(f"{place}: {name} has values other than 0 and 1, which are no marks; write the rows again")
        if name == _ATTENTION_COLUMN:
            is_text = values == 1
        else:
            learned &= values == 1
    return array[is_text], learned[is_text]


def _integers(place: str, cells: Any, kinds: str) -> NDArray[np.int64]:
    array = np.asarray(cells if cells else [], dtype=None if cells else np.int64)
    if array.ndim != 1 or array.dtype.kind not in kinds:
        raise DataError(f"{place} is not a list of integers; tokenize the source again")
    return array.astype(np.int64)


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
        self._num_tokens = self._num_documents = 0

    def write(self, ids: NDArray[np.int64], loss_mask: NDArray[np.bool_]) -> None:
        """Append a document.

        Raises:
            DataError: an id does not fit int32, the type of the column.
        """
        if int(ids.max(initial=0)) > _LARGEST_ID:
            raise DataError(
                f"{self.path}: document {self._num_documents} has the id {int(ids.max()):,}, which int32 cannot hold: "
                "the input is damaged; check it with internlm data verify"
            )
        self._num_documents += 1
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
