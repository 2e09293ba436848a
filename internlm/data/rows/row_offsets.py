"""The byte offsets of the rows of a text file: lines or paragraphs; built once, cached on disk with a checksum.

Takes memory for one block of the file, whatever its size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from internlm.data.documents.index_cache import cached, locked_index, store
from internlm.data.remote.local_file import local_file
from internlm.utils.logging import get_logger

TextUnit = Literal["line", "paragraph", "file"]
"""What is a row of a text file; paragraphs are separated by blank lines."""

_BLOCK = 1 << 24
"""Bytes searched for line ends at once."""

_LOGGED_BYTES = 256 * 2**20
"""Size of a file whose index takes a noticeable time."""

_WHITE_SPACE = np.zeros(256, dtype=np.bool_)
_WHITE_SPACE[list(b" \t\r\n\v\f")] = True

logger = get_logger(__name__)


@dataclass(frozen=True)
class OffsetFile:
    """A text file that offsets are built of."""

    path: Path

    @property
    def inputs(self) -> Sequence[Path]:
        """The file."""
        return (self.path,)

    @property
    def reading(self) -> str:
        """Nothing: rows have their numbers from the file alone."""
        return ""


def offset_index(path: Path, unit: TextUnit) -> Path:
    """The cached index of the rows of a file, built if it is missing or its checksum is wrong."""
    file, kind = OffsetFile(path), f"{unit}-offsets"
    found = cached(file, kind, ".bin")
    if found is not None and _is_intact(found):
        return found
    with locked_index(file, kind):
        found = cached(file, kind, ".bin")
        if found is not None:
            if _is_intact(found):
                return found
            logger.warning("%s: the cached index is damaged (checksum); building it again", found)
        size = path.stat().st_size
        if size >= _LOGGED_BYTES:
            logger.info("%s: building the index of the rows of %s bytes; it is cached", path, f"{size:,}")
        return store(file, kind, ".bin", lambda target: _write(target, path, unit))


def map_offsets(index: Path) -> NDArray[np.int64]:
    """The offset of each row and the size of the file: int64 [rows + 1], memory-mapped.

    Blank lines are no rows; a row is followed by those up to the next one.
    """
    return np.memmap(index, mode="r", dtype="<i8")[:-1]


def _is_intact(index: Path) -> bool:
    size = index.stat().st_size
    if size < 16 or size % 8:
        return False
    content = np.memmap(index, mode="r", dtype="<i8")
    digest = xxhash.xxh3_64()
    for start in range(0, len(content) - 1, _BLOCK):
        digest.update(content[start : min(start + _BLOCK, len(content) - 1)].data)
    return digest.intdigest() == int(content[-1:].view("<u8")[0])


def _write(target: Path, path: Path, unit: TextUnit) -> None:
    digest = xxhash.xxh3_64()
    with open(target, "wb") as file, local_file(path) as content:
        for offsets in _blocks_of_offsets(content, unit):
            part = offsets.astype("<i8").tobytes()
            digest.update(part)
            file.write(part)
        file.write(np.array([digest.intdigest()], dtype="<u8").tobytes())


def _blocks_of_offsets(path: Path, unit: TextUnit) -> Iterator[NDArray[np.int64]]:
    size = path.stat().st_size
    if unit == "file" and size:
        yield np.zeros(1, dtype=np.int64)
    elif size:
        yield from _starts_of_rows(path, size, is_paragraph=unit == "paragraph")
    yield np.array([size], dtype=np.int64)


def _starts_of_rows(path: Path, size: int, *, is_paragraph: bool) -> Iterator[NDArray[np.int64]]:
    data = np.memmap(path, mode="r", dtype=np.uint8)
    first_line, after_blank = 0, True
    for block in range(0, size, _BLOCK):
        ends = np.flatnonzero(data[block : block + _BLOCK] == ord("\n")) + block
        starts = np.concatenate(([first_line], ends + 1))
        if block + _BLOCK >= size and starts[-1] < size:
            ends = np.append(ends, size)
        starts, first_line = starts[: len(ends)], int(starts[-1])
        has_text = ~_is_blank(data, starts, ends)
        if is_paragraph and len(starts):
            begins = has_text & ~np.concatenate(([not after_blank], has_text[:-1]))
            after_blank = not has_text[-1]
            yield starts[begins]
        else:
            yield starts[has_text]


def _is_blank(data: NDArray[np.uint8], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether the lines [start, end), without their newlines, have only white space: bool [lines]."""
    blank = starts == ends
    last = data[np.maximum(ends - 1, starts)]
    last = np.where(last == ord("\r"), data[np.maximum(ends - 2, starts)], last)
    # Most lines with text begin or end with it; the others are rare enough for Python.
    for line in np.flatnonzero(~blank & _WHITE_SPACE[data[starts]] & _WHITE_SPACE[last]):
        blank[line] = bytes(data[starts[line] : ends[line]]).isspace()
    return blank
