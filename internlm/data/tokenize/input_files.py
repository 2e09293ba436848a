"""Finds and opens the files to tokenize: formats by suffix, compression, folders.

Owns suffixes and the errors of opening a file. Must not know file contents.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from internlm.utils.errors import DataError
from internlm.utils.folder_walk import walk_links

FORMATS = ("txt", "json", "jsonl", "parquet")
_SUFFIXES = {f".{name}": name for name in FORMATS} | {".ndjson": "jsonl"}
_MAX_NAMES = 8
"""Number of files that a message names; the others are counted."""


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
TOKEN_SUFFIXES = (".bin", ".npy", ".ds")
RECORD_SUFFIX = ".tokenizer.json"
READ_SUFFIXES = ", ".join(f"*{suffix}" for suffix in _SUFFIXES)
READ_COMPRESSIONS = ", ".join(_DECOMPRESSORS)


@dataclass(frozen=True)
class InputFiles:
    """The files that were found.

    Attributes:
        files: (path, format), in reading order.
        ignored: files in folders whose suffix is not that of a known format.
    """

    files: list[tuple[Path, str]]
    ignored: list[Path]


def find_inputs(paths: Iterable[str | Path], format: str | None = None) -> InputFiles:
    """Find the input files and their formats; folders are searched recursively, in sorted order.

    Suffixes are case-insensitive, and a suffix of compression may follow: `A.JSONL.gz` has JSON lines.

    Args:
        paths: files and folders.
        format: format of files with an unknown suffix; in folders, such files are ignored.

    Raises:
        DataError: a path is missing, cannot be searched, or has no file of a known format.
    """
    files: list[tuple[Path, str]] = []
    ignored: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            everything = _files_below(path)
            inside = [(file, kind) for file in everything if (kind := _format_of(file))]
            others = [file for file in everything if _format_of(file) is None]
            if not inside:
                content = f"; it contains {name_some(others, path)}" if others else ", which is empty"
                raise DataError(
                    f"{path}: no file named {READ_SUFFIXES} (or compressed, with {READ_COMPRESSIONS}) in this folder"
                    f"{content}"
                )
            if broken := [file for file, _ in inside if not file.is_file()]:
                raise DataError(f"{name_some(broken)}: not a regular file, or a broken link; remove it")
            files += inside
            ignored += others
        elif path.is_file():
            kind = _format_of(path) or format
            if kind is None and path.suffix in TOKEN_SUFFIXES:
                raise DataError(f"{path}: no text, but token ids; `internlm data inspect {path}` shows them")
            if kind is None:
                raise DataError(f"{path}: unknown suffix; name the format with --format {'|'.join(FORMATS)}")
            if kind == "parquet" and is_compressed(path):
                raise DataError(
                    f"{path}: parquet needs random access, so it cannot be read compressed; decompress it first"
                )
            files.append((path, kind))
        elif path.exists():
            raise DataError(f"{path}: neither a regular file nor a folder; read a pipe as '-', with --format")
        else:
            raise DataError(f"{path}: no such file or folder")
    return InputFiles(files, ignored)


def name_some(paths: Iterable[Path], base: Path | None = None) -> str:
    """List the names of the first few of `paths`, relative to `base`, and the number of the others."""
    paths = list(paths)
    names = [str(path.relative_to(base) if base else path) for path in paths[:_MAX_NAMES]]
    rest = f" and {len(paths) - len(names):,} more" if len(paths) > len(names) else ""
    return ", ".join(names) + rest


def is_tokenizer_record(path: Path) -> bool:
    """Whether a file is the record of the tokenizer beside a file of token ids, which is JSON without rows."""
    return path.name.endswith(RECORD_SUFFIX) and path.name.removesuffix(RECORD_SUFFIX).endswith(TOKEN_SUFFIXES)


def is_compressed(path: Path) -> bool:
    """Whether the suffix is that of a compression."""
    return path.suffix.lower() in _DECOMPRESSORS


def open_input(path: Path) -> BinaryIO:
    """Open a file for reading bytes, decompressed according to its suffix.

    Raises:
        DataError: the file cannot be read. Reading from the result raises it where compressed data is damaged.
    """
    decompress = _DECOMPRESSORS.get(path.suffix.lower())
    try:
        if decompress is None:
            return open(path, "rb")
        return io.BufferedReader(_Decompressed(path, decompress(path)), 1 << 16)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


class _Decompressed(io.RawIOBase):
    """The bytes of a compressed file; raises DataError where they are damaged."""

    def __init__(self, path: Path, stream: Any) -> None:
        self._path, self._stream = path, stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise DataError(
                f"{self._path}: the compressed data is damaged or truncated ({error}); compress or copy the file again"
            ) from error
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()


def _format_of(path: Path) -> str | None:
    """The format by the suffix; None if it is unknown."""
    if is_tokenizer_record(path):
        return None
    if not is_compressed(path):
        return _SUFFIXES.get(path.suffix.lower())
    kind = _SUFFIXES.get(path.with_suffix("").suffix.lower())
    return None if kind == "parquet" else kind


def _files_below(folder: Path) -> list[Path]:
    """All files at or below a folder, sorted; follows links, except those to a folder that contains the link."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: the folder cannot be read: {error.strerror}") from error

    found: list[Path] = []
    for place, _, names in walk_links(folder, refuse):
        found += [Path(place, name) for name in names]
    return sorted(found)
