"""The protocol of a file of rows, such as parquet or JSON lines, and reading the text of a row.

A format is a reader with this protocol. What is done with rows (the order, tokenization, packing) knows no format.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from internlm.data.conversations.row_forms import fitting_forms
from internlm.data.tokenize.text_inputs import check_unicode
from internlm.utils.errors import DataError, nearest


class RowFile(Protocol):
    """Random access to the rows of one file. Picklable; the file is opened at first use, in each process.

    Attributes:
        path: the file that messages name.
        inputs: the files that the rows depend on; an index built from other versions of them is not used.
        reading: see `DocumentFile`.
        block_starts: first row of each block, ascending: int64 [blocks]. Reading a row decodes its block and keeps it,
            so an order that stays in a block for a while is cheap. None: rows are read singly, in any order.
    """

    @property
    def path(self) -> Path: ...

    @property
    def inputs(self) -> Sequence[Path]: ...

    @property
    def reading(self) -> str: ...

    @property
    def block_starts(self) -> NDArray[np.int64] | None: ...

    def __len__(self) -> int:
        """Number of rows in the file.

        Raises:
            DataError: the file is missing, damaged, or has changed since it was first read.
        """

    def read(self, row: int) -> dict[str, Any]:
        """Read the values of a row: those of the chosen columns, or of all.

        Raises:
            DataError: the row is malformed, or has no such column; names the file and the row.
            IndexError: no such row.
        """


def read_text(file: RowFile, row: int, column: str) -> str:
    """Read the text of a row.

    Raises:
        DataError: the row is malformed, has no such column, or its value is not text; names the file and the row.
    """
    values = file.read(row)
    if column not in values:
        raise missing_column(file.path, row, column, values)
    text = values[column]
    place = f"{file.path}: row {row}: '{column}'"
    if text is None:
        raise DataError(f"{place} is null; remove the row, or name the column of the text with data.content_name")
    if not isinstance(text, str):
        raise DataError(
            f"{place} is {type(text).__name__}, not text; name the column of the text with data.content_name"
        )
    return check_unicode(text, place)


def missing_column(path: Path, row: int, column: str, columns: Iterable[str]) -> DataError:
    """The error for a row without a column."""
    known = list(columns)
    similar = nearest(column, known)
    fix = f"Name the column of the text with data.content_name.{similar}"
    if not similar and fitting_forms(known):
        fix = "These are conversations: set data.conversations = {}, in data.blend conversations={} of the source"
    return DataError(f"{path}: row {row} has no column '{column}'; its columns are {known}. {fix}")


def checked_row(row: int, num_rows: int, path: Path) -> int:
    """Return `row` if it is in [0, num_rows).

    Raises:
        IndexError: it is not.
    """
    if not 0 <= row < num_rows:
        raise IndexError(f"{path}: no row {row}; the file has {num_rows:,} rows")
    return row
