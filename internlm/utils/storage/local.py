"""Local files, with errors that name path, cause and fix."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from internlm.utils.storage.failures import Explanation, ReplacedError, named_failures
from internlm.utils.storage.store import StoredFile
from internlm.utils.storage.streams import Sink


class LocalStore:
    """The file systems of this machine; keys are paths."""

    block_bytes = 128 * 1024

    def is_file(self, key: str) -> bool:
        return Path(key).is_file()

    def is_folder(self, key: str) -> bool:
        return Path(key).is_dir()

    def names(self, key: str) -> list[str]:
        try:
            return os.listdir(key)
        except FileNotFoundError:
            return []

    def size(self, key: str) -> int:
        return os.stat(key).st_size

    def files(self, key: str) -> Iterator[StoredFile]:
        for place, _, names in os.walk(key):
            for path in (Path(place, name) for name in names):
                yield StoredFile(path.relative_to(key).as_posix(), path.stat().st_size, self.version(str(path)))

    def version(self, key: str) -> str:
        return str(os.stat(key).st_mtime_ns)

    def open_read(self, key: str, url: str, version: str | None = None) -> LocalSource:
        if version is not None and self.version(key) != version:
            raise ReplacedError(key)
        return LocalSource(key)

    def open_write(self, key: str, url: str) -> LocalSink:
        return LocalSink(key)

    def make_folder(self, key: str) -> None:
        os.makedirs(key, exist_ok=True)

    def remove(self, key: str) -> None:
        try:
            if os.path.isdir(key) and not os.path.islink(key):
                shutil.rmtree(key)
            else:
                os.unlink(key)
        except FileNotFoundError:
            pass

    def explain(self, error: Exception) -> Explanation | None:
        if not isinstance(error, OSError):
            return None
        cause = (error.strerror or str(error)).lower()
        fix = FIXES.get(error.errno or 0, "check the disk and the path")
        return Explanation(cause, fix, is_missing=isinstance(error, FileNotFoundError))


FIXES = {
    errno.ENOSPC: "free space on that disk, or choose another folder",
    errno.EDQUOT: "free space in your quota, or choose another folder",
    errno.EFBIG: "choose a file system that supports files of that size",
    errno.EACCES: "ask for permission on it, or choose another folder",
    errno.EPERM: "ask for permission on it, or choose another folder",
    errno.EROFS: "choose a folder on a disk that can be written to",
    errno.ENOENT: "check the spelling",
    errno.ENOTDIR: "a part of this path is a file where a folder should be; remove it, or choose another path",
    errno.EEXIST: "there is a file where a folder should be; remove it, or choose another path",
    errno.EISDIR: "there is a folder where a file should be; choose another path",
    errno.EIO: "the disk is failing; choose another one",
    errno.ESTALE: "the network file system lost it; mount it again",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENOTEMPTY: "empty it, or choose another folder",
    errno.EXDEV: "the two are on different disks; choose folders on the same one",
}
LOCAL_STORE = LocalStore()


class LocalSource(io.FileIO):
    """A file being read."""

    def readinto(self, buffer: Any, /) -> int:
        with named_failures(LOCAL_STORE, "read", str(self.name)):
            return super().readinto(buffer)

    def readall(self) -> bytes:
        with named_failures(LOCAL_STORE, "read", str(self.name)):
            return super().readall()


class LocalSink(Sink):
    """A file being written; closing it flushes it to disk (fsync)."""

    def __init__(self, url: str) -> None:
        super().__init__(LOCAL_STORE, url)
        self._file = io.FileIO(url, "w")

    def fileno(self) -> int:
        return self._file.fileno()

    def put(self, data: memoryview) -> int:
        return self._file.write(data)

    def finish(self) -> None:
        os.fsync(self._file.fileno())
        # Network file systems report some errors only on close.
        self._file.close()

    def discard(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
            os.unlink(self.url)


def rename(old: Path, new: Path) -> None:
    """Rename, and flush the new name to disk."""
    os.replace(old, new)
    folder = os.open(new.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
