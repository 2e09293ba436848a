"""Which files are read, as what, and how they are opened: formats by suffix, compression, folders.

Owns suffixes and all that can go wrong in opening a file. Knows nothing of what is in it.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from internlm.utils.errors import DataError

FORMATS = ("txt", "json", "jsonl", "parquet")
_SUFFIXES = {f".{name}": name for name in FORMATS} | {".ndjson": "jsonl"}
_NAMED_FILES = 8
"""Files that a message names; of the others it gives the number."""


def _open_zstd(path: Path) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")


_DECOMPRESSORS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
    ".zstd": _open_zstd,
}
READ_SUFFIXES = ", ".join(f"*{suffix}" for suffix in _SUFFIXES)
READ_COMPRESSIONS = ", ".join(_DECOMPRESSORS)


@dataclass(frozen=True)
class InputFiles:
    """What was found.

    Attributes:
        files: (path, format), in the order in which they are read.
        left_out: files of folders whose suffix says no known format.
    """

    files: list[tuple[Path, str]]
    left_out: list[Path]


def find_inputs(paths: Iterable[str | Path], format: str | None = None) -> InputFiles:
    """The input files with their formats; folders are searched recursively, in sorted order.

    A suffix counts in any case, and before one of compression: `A.JSONL.gz` is JSON lines.

    Args:
        format: of files whose suffix does not say it; files in a folder are taken by suffix alone.
    Raises:
        DataError: a path is missing or cannot be searched, or holds no file of a known format.
    """
    files: list[tuple[Path, str]] = []
    left_out: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            everything = _files_below(path)
            inside = [(file, kind) for file in everything if (kind := _format_of(file))]
            others = [file for file in everything if _format_of(file) is None]
            if not inside:
                holds = f"; it holds {name_some(others, path)}" if others else ", and no other"
                raise DataError(
                    f"{path}: no file named {READ_SUFFIXES} in this folder (also behind {READ_COMPRESSIONS}){holds}"
                )
            if broken := [file for file, _ in inside if not file.is_file()]:
                raise DataError(f"{name_some(broken)}: no regular file, or a link to none; remove it")
            files += inside
            left_out += others
        elif path.is_file():
            kind = _format_of(path) or format
            if kind is None:
                raise DataError(f"{path}: the suffix says no format; give one with --format {'|'.join(FORMATS)}")
            if kind == "parquet" and is_compressed(path):
                raise DataError(f"{path}: parquet is read from any place, so it cannot be compressed; unpack it first")
            files.append((path, kind))
        elif path.exists():
            raise DataError(f"{path}: neither a regular file nor a folder; read a pipe as '-', with --format")
        else:
            raise DataError(f"{path}: no such file or folder")
    return InputFiles(files, left_out)


def name_some(paths: Iterable[Path], base: Path | None = None) -> str:
    """The names of a few of `paths`, relative to `base`, and how many there are beside."""
    paths = list(paths)
    names = [str(path.relative_to(base) if base else path) for path in paths[:_NAMED_FILES]]
    rest = f" and {len(paths) - len(names):,} more" if len(paths) > len(names) else ""
    return ", ".join(names) + rest


def is_compressed(path: Path) -> bool:
    """Whether the suffix says a compression."""
    return path.suffix.lower() in _DECOMPRESSORS


def open_input(path: Path) -> BinaryIO:
    """Open a file to read its bytes, decompressed if its suffix says so.

    Raises:
        DataError: it cannot be read; the file that is returned raises it, too, where the compressed data is damaged.
    """
    decompress = _DECOMPRESSORS.get(path.suffix.lower())
    try:
        if decompress is None:
            return open(path, "rb")
        return io.BufferedReader(_Decompressed(path, decompress(path)), 1 << 16)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


class _Decompressed(io.RawIOBase):
    """The bytes of a compressed file; damage is a DataError that names it."""

    def __init__(self, path: Path, stream: Any) -> None:
        self._path, self._stream = path, stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise DataError(
                f"{self._path}: the compressed data is damaged or ends too early ({error}); make or copy the file again"
            ) from error
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()


def _format_of(path: Path) -> str | None:
    """The format that the suffix says; None for an unknown one."""
    if not is_compressed(path):
        return _SUFFIXES.get(path.suffix.lower())
    kind = _SUFFIXES.get(path.with_suffix("").suffix.lower())
    return None if kind == "parquet" else kind


def _files_below(folder: Path) -> list[Path]:
    """All files in a folder, sorted; links are followed, and a link to a folder above it only once."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: the folder cannot be read: {error.strerror}") from error

    found: list[Path] = []
    for place, subfolders, names in os.walk(folder, followlinks=True, onerror=refuse):
        above = os.path.realpath(place)
        subfolders[:] = [
            name
            for name in subfolders
            if not (os.path.islink(link := os.path.join(place, name)) and _is_above(os.path.realpath(link), above))
        ]
        found += [Path(place, name) for name in names]
    return sorted(found)


def _is_above(folder: str, below: str) -> bool:
    return os.path.commonpath([folder, below]) == folder
