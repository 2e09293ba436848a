"""Reads rows of text files by number: JSON lines, a JSON array, and plain text."""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internlm.data.remote.local_file import keep_open
from internlm.data.rows.file_version import FileVersion, RandomAccessFile, check_version, version_of_file
from internlm.data.rows.process_cache import OPEN_FILES
from internlm.data.rows.row_file import checked_row, missing_column
from internlm.data.rows.row_offsets import TextUnit, map_offsets, offset_index
from internlm.data.rows.text_copy import text_copy
from internlm.data.tokenize.input_files import is_compressed
from internlm.data.tokenize.json_values import decode_utf8
from internlm.utils.errors import DataError

TEXT_COLUMN = "text"
"""The column of a row that has no names: a line of text, or a string in JSON lines."""


@dataclass(frozen=True)
class _Indexed:
    """A file with offsets.

    Attributes:
        path, version: the file with the bytes, which is a copy if the file of the rows has no offsets itself.
        index: its cached index.
        bytes_key, offsets_key: of both among the open files.
    """

    path: Path
    version: FileVersion
    index: Path
    bytes_key: Hashable
    offsets_key: Hashable


class TextRows:
    """Random access to the rows of a text file: its lines or paragraphs without their newlines, or the whole file.

    Args:
        path: the file, which may be compressed.
        unit: what is a row. Blank lines are none.

    Raises:
        DataError: no such file.
    """

    block_starts: NDArray[np.int64] | None = None

    def __init__(self, path: str | Path, unit: TextUnit = "line") -> None:
        self.path = Path(path)
        self._unit = unit
        self._version = version_of_file(self.path)
        self._array = False
        self._indexed: _Indexed | None = None

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
        return len(self._offsets()) - 1

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_indexed": None}

    def read(self, row: int) -> dict[str, Any]:
        """Read a row: `{"text": text}`.

        Raises:
            DataError: not UTF-8; names the file, the byte and the row.
        """
        return {TEXT_COLUMN: self._decode(row, self._read_bytes(row))}

    def _index(self) -> _Indexed:
        if self._indexed is None:
            path, version = self.path, self._version
            check_version(path, version)
            if self._array or is_compressed(path):
                path = text_copy(path, version, is_array=self._array)
                version = version_of_file(path)
            index = offset_index(path, self._unit)
            bytes_key = ("text", str(path), version.size, version.mtime_ns)
            # By its inode too: an index that is built again replaces a damaged one that may still be open.
            offsets_key = ("offsets", str(index), index.stat().st_ino)
            self._indexed = _Indexed(path, version, index, bytes_key, offsets_key)
        return self._indexed

    def _offsets(self) -> NDArray[np.int64]:
        indexed = self._index()
        # A mapped file is an open file.
        offsets: NDArray[np.int64] = OPEN_FILES.get(indexed.offsets_key, lambda: map_offsets(indexed.index))
        return offsets

    def _read_bytes(self, row: int) -> bytes:
        indexed, offsets = self._index(), self._offsets()
        row = checked_row(row, len(offsets) - 1, self.path)
        file = keep_open(
            indexed.path, indexed.bytes_key, lambda content: RandomAccessFile(indexed.path, indexed.version, content)
        )
        data: bytes = file.read(int(offsets[row]), int(offsets[row + 1]))
        if self._unit == "file":
            return data
        # Blank lines may follow; white space at the end of the last line with text belongs to the row.
        end = data.find(b"\n", len(data.rstrip()))
        return data if end < 0 else data[:end].removesuffix(b"\r")

    def _decode(self, row: int, data: bytes) -> str:
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            try:
                decode_utf8(data, self.path, int(self._offsets()[row]))
            except DataError as error:
                raise DataError(f"{error} (row {row})") from error
            raise
        return text.removeprefix("\ufeff") if row == 0 else text


class JsonRows(TextRows):
    """Random access to the rows of JSON lines, or of a file with one JSON array.

    A string is the row `{"text": string}`.

    Args:
        path: the file, which may be compressed.
        columns: to read; None: all.
        is_array: whether the file has one array (.json) instead of lines. Values without an array are accepted too.

    Raises:
        DataError: no such file.
    """

    def __init__(self, path: str | Path, columns: Sequence[str] | None = None, *, is_array: bool = False) -> None:
        super().__init__(path)
        self._columns = None if columns is None else tuple(columns)
        self._array = is_array

    def read(self, row: int) -> dict[str, Any]:
        """Read a row.

        Raises:
            DataError: not UTF-8, not JSON, not an object, or without one of the columns; names the file and the row.
        """
        text = self._decode(row, self._read_bytes(row))
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            offset = int(self._offsets()[row])
            raise DataError(f"{self.path}: row {row} (byte {offset}) is not JSON: {error}") from error
        if isinstance(values, str):
            values = {TEXT_COLUMN: values}
        if not isinstance(values, dict):
            hint = "; if the file is a single array, name it .json" if isinstance(values, list) else ""
            raise DataError(f"{self.path}: row {row} is {type(values).__name__}, not an object {{...}}{hint}")
        if self._columns is None:
            return values
        for column in self._columns:
            if column not in values:
                raise missing_column(self.path, row, column, values)
        return {column: values[column] for column in self._columns}
