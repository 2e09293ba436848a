"""Where a picture is: in a file of its own, in a row of a file, or nowhere, for random data.

A document has the sources of its pictures, in the order of their placeholders. Pixels are read with the whole sample.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from internlm.data.rows.open_rows import open_rows
from internlm.data.rows.row_file import RowFile
from internlm.utils.errors import DataError

FOLDER_KEY = "data.image_folder"
_OPEN_FILES = 128


@dataclass(frozen=True)
class ImageFile:
    """A picture in a file of its own.

    Attributes:
        path: of the file.
        document: file and position of the document, for messages.
    """

    path: Path
    document: str

    @property
    def name(self) -> str:
        """How messages name the picture."""
        return str(self.path)

    def check(self) -> None:
        """Check that the file exists and is not empty.

        Raises:
            DataError: it does not, or is.
        """
        _check_file(self.path, self.document)

    def read(self) -> bytes:
        """Read the encoded picture.

        Raises:
            DataError: the file is missing or cannot be read.
        """
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise DataError(
                f"{self.path}: {error.strerror or error}; it is a picture of {self.document}. Copy it there, correct "
                f"{FOLDER_KEY}, or remove the document"
            ) from error


@dataclass(frozen=True)
class ImageCell:
    """A picture whose bytes are in a row of a file.

    Attributes:
        path: of the file of rows.
        row: number of the row.
        column: name of the column.
        index: which of the pictures of the row.
        document: file and position of the document, for messages.
        data: the bytes, where the row has just been read; None: `read` reads the row.
    """

    path: Path
    row: int
    column: str
    index: int
    document: str
    data: bytes | None = field(default=None, repr=False, compare=False)

    @property
    def name(self) -> str:
        """How messages name the picture."""
        return f"{self.path}: row {self.row}: '{self.column}', picture {self.index}"

    def check(self) -> None:
        """See `ImageFile.check`."""
        _check_file(self.path, self.document)

    def read(self) -> bytes:
        """Read the encoded picture.

        Raises:
            DataError: the file is missing or damaged, or the row has no such picture.
        """
        if self.data is not None:
            return self.data
        try:
            values = images_of_cell(_rows(self.path, self.column).read(self.row)[self.column])
            data = bytes_of(values[self.index])
        except IndexError:
            data = None
        if data is None:
            raise DataError(
                f"{self.name}: no such picture, though {self.document} was tokenized with it: the file has changed; "
                "tokenize it again"
            )
        return data


@dataclass(frozen=True)
class RandomImage:
    """A picture of standard normal noise, for runs without data.

    Attributes:
        key: of its random numbers.
    """

    key: int

    @property
    def name(self) -> str:
        """How messages name the picture."""
        return f"random {self.key}"

    def check(self) -> None:
        """See `ImageFile.check`."""


ImageSource = ImageFile | ImageCell | RandomImage


def image_file(text: str, folder: Path | None, document: str) -> ImageFile:
    """The picture at a path relative to the image folder.

    Raises:
        DataError: there is no image folder, or the path is empty, absolute or leads out of the folder.
    """
    if folder is None:
        raise DataError(f"{document} has the picture {text!r}: set {FOLDER_KEY}, to which its path is relative")
    # Paths are data, which may come from anywhere: none of them may name files beside the data.
    path = PurePosixPath(text)
    if not text or "\x00" in text:
        raise DataError(f"{document} has a picture with the path {text!r}: correct it, or remove the document")
    if path.is_absolute() or PureWindowsPath(text).is_absolute() or ".." in path.parts:
        what = "leaves the image folder" if ".." in path.parts else "is absolute"
        raise DataError(
            f"{document} has the picture {text!r}, whose path {what}: write it relative to {FOLDER_KEY} = {folder}"
        )
    return ImageFile(folder / path, document)


@functools.lru_cache(maxsize=_OPEN_FILES)
def _rows(path: Path, column: str) -> RowFile:
    return open_rows(path, [column])


def _check_file(path: Path, document: str) -> None:
    if not path.is_file() or not path.stat().st_size:
        what = "the file is empty" if path.is_file() else "no such file"
        raise DataError(
            f"{path}: {what}; it has a picture of {document}. Copy it there, correct {FOLDER_KEY}, or "
            "remove the document"
        )


def images_of_cell(value: Any) -> list[Any]:
    """The pictures of a value of a row: None, one, or a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def bytes_of(value: Any) -> bytes | None:
    """The bytes in a value of a row: plain, or in the struct {bytes, path} of `datasets`; None: it has none."""
    data = value.get("bytes") if isinstance(value, Mapping) else value
    return data if isinstance(data, bytes) else None


def to_json(source: ImageSource, folder: Path | None) -> Any:
    """A source as the line of a tokenized file has it: a path relative to the image folder, or where its bytes are."""
    if isinstance(source, ImageFile):
        assert folder is not None
        return source.path.relative_to(folder).as_posix()
    assert isinstance(source, ImageCell)
    inside = folder is not None and source.path.is_relative_to(folder)
    file = source.path.relative_to(folder).as_posix() if inside and folder else str(source.path.absolute())
    return {"file": file, "row": source.row, "column": source.column, "index": source.index}


def from_json(value: Any, folder: Path | None, document: str) -> ImageSource:
    """The inverse of `to_json`.

    Raises:
        DataError: the value is malformed; see `image_file`.
    """
    if isinstance(value, str):
        return image_file(value, folder, document)
    if isinstance(value, dict) and value.keys() == {"file", "row", "column", "index"}:
        file, row, column, index = value["file"], value["row"], value["column"], value["index"]
        types_fit = isinstance(file, str) and isinstance(column, str) and type(row) is type(index) is int
        if types_fit and row >= 0 and index >= 0:
            path = Path(file) if Path(file).is_absolute() else image_file(file, folder, document).path
            return ImageCell(path, row, column, index, document)
    raise DataError(
        f"{document} has the picture {value!r}: expected a path relative to {FOLDER_KEY}, or "
        "{'file', 'row', 'column', 'index'}; tokenize the source again"
    )
