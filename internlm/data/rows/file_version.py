"""The version of a file: what shows that it has changed, or was never there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from internlm.utils.errors import DataError

_LFS_POINTER = b"version https://git-lfs.github.com/spec"
_MAX_POINTER_BYTES = 1024


@dataclass(frozen=True)
class FileVersion:
    """Size in bytes and time of the last change in ns of a file."""

    size: int
    mtime_ns: int


def version_of_file(path: Path) -> FileVersion:
    """The present version of a file; opens it only if it is as small as a pointer of Git LFS.

    Raises:
        DataError: no such file, or a pointer of Git LFS instead of the file.
    """
    try:
        status = path.stat()
        if status.st_size <= _MAX_POINTER_BYTES and path.is_file():
            with open(path, "rb") as file:
                if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                    raise DataError(
                        f"{path}: a pointer of Git LFS, not the file itself; run `git lfs pull` in its folder, or "
                        "download it with `hf download`"
                    )
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    if not path.is_file():
        raise DataError(f"{path}: not a regular file")
    return FileVersion(status.st_size, status.st_mtime_ns)


def check_version(path: Path, expected: FileVersion) -> None:
    """Check that a file is the version that the run began with.

    Raises:
        DataError: it is not, or it is gone.
    """
    if version_of_file(path) != expected:
        raise DataError(
            f"{path}: changed since the run opened it, so its rows have other numbers. Restore it, or start the run "
            "again with the new file"
        )


class RandomAccessFile:
    """A file read at offsets, without a position that threads or forked processes would share.

    Args:
        path: the file.
        version: it must have.
        content: to open; None: the file.

    Raises:
        DataError: it is missing or another version.
    """

    def __init__(self, path: Path, version: FileVersion, content: Path | None = None) -> None:
        check_version(path, version)
        self._path = path
        try:
            self._descriptor: int | None = os.open(content or path, os.O_RDONLY)
        except OSError as error:
            self._descriptor = None
            raise DataError(f"{path}: {error.strerror or error}") from error

    def read(self, start: int, stop: int) -> bytes:
        """Read the bytes [start, stop).

        Raises:
            DataError: the file ends before, or its disk fails.
        """
        assert self._descriptor is not None
        parts, position = [], start
        while position < stop:
            try:
                part = os.pread(self._descriptor, stop - position, position)
            except OSError as error:
                raise DataError(f"{self._path}: byte {position}: {error.strerror or error}") from error
            if not part:
                raise DataError(f"{self._path}: truncated to {position:,} bytes while the run reads it; restore it")
            parts.append(part)
            position += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)  # type: ignore[arg-type]
