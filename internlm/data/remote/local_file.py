"""Opens files of folders that may be mirrors: a large file of a mirror is fetched when it is opened.

An open file of a mirror is in use, so a process has few at a time, whatever its readers; a file that was closed or
removed from the cache is opened again at its next use. Local files cost one comparison of text.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, Generic, TypeVar

from internlm.data.remote.fetching import fetch
from internlm.data.remote.mirror import MIRROR_SUFFIX, Mirror, is_companion, read_mirror, version_hash
from internlm.data.remote.transfer import disk_error, download
from internlm.data.rows.process_cache import OPEN_FILES, ProcessCache
from internlm.utils.errors import RemoteDataError
from internlm.utils.file_lock import open_shared

T = TypeVar("T")

_MAX_OPEN = 2
"""Of a process: a file, and one that belongs to it, such as its loss mask."""

_HEAD_BYTES = 4096

_OPENED: ProcessCache[tuple[Any, LocalFile]] = ProcessCache(_MAX_OPEN, lambda file: 1)


class LocalFile:
    """A file with all of its content. While the object exists, the file is in use and stays in the cache.

    Attributes:
        path: to open.
    """

    def __init__(self, path: Path, descriptor: int | None = None) -> None:
        self.path, self._descriptor = path, descriptor

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the use of the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        self.close()


def local_file(path: Path) -> LocalFile:
    """The file itself or, of a large file of a mirror, its content, which is fetched if it is not there.

    Raises:
        RemoteDataError: it cannot be fetched.
    """
    found = find_mirrored(path)
    if found is None:
        return LocalFile(path)
    mirror, name = found
    content = mirror.content(name)
    while (descriptor := open_shared(content)) is None:
        _OPENED.drop_all()
        fetch(mirror, name)
    # The order of removal; by a finer clock than that of the file system.
    now = time.time_ns()
    os.utime(descriptor, ns=(now, now))
    return LocalFile(content, descriptor)


def find_mirrored(path: Path) -> tuple[Mirror, str] | None:
    """The mirror and the name of a large file in it; None for any other file."""
    if MIRROR_SUFFIX not in str(path):
        return None
    folder = next((each for each in path.parents if each.name.endswith(MIRROR_SUFFIX)), None)
    mirror = None if folder is None else read_mirror(folder)
    if mirror is None or not path.is_relative_to(mirror.tree):
        return None
    name = path.relative_to(mirror.tree).as_posix()
    return None if name not in mirror.files or is_companion(mirror.files[name]) else (mirror, name)


def head_file(path: Path) -> Path:
    """A file with the same size and the same first 4096 bytes, which is the file itself unless it is of a mirror.

    Raises:
        RemoteDataError: they cannot be fetched.
    """
    found = find_mirrored(path)
    if found is None:
        return path
    mirror, name = found
    file, url = mirror.files[name], mirror.url_of(name)
    head = mirror.path / "heads" / version_hash(file)
    if not head.is_file():
        temporary = head.with_name(f".tmp-{head.name}-{os.getpid()}")
        try:
            head.parent.mkdir(exist_ok=True)
            with open(temporary, "wb") as target:
                download(url, file, target, stop=_HEAD_BYTES)
                target.truncate(file.size)
            os.replace(temporary, head)
        except RemoteDataError:
            raise
        except OSError as error:
            raise disk_error(str(url), mirror.path, error) from error
    return head


class LazyFile(Generic[T]):
    """A file opened for reading: a local one now, a large one of a mirror at each use after another file.

    Args:
        path: the file.
        kind: how it is opened; readers with the same kind share the open file.
        load: opens it.
    """

    def __init__(self, path: Path, kind: str, load: Callable[[Path], T]) -> None:
        self._path, self._load = path, load
        self._value: T | None = None
        self._mtime_ns: int | None = None
        if find_mirrored(path) is None:
            self._value = load(path)
        else:
            self._mtime_ns = path.stat().st_mtime_ns
        self._key = (kind, str(path), self._mtime_ns)

    def get(self) -> T:
        """The open file.

        Raises:
            RemoteDataError: it cannot be fetched, or the mirror now has another version.
        """
        if self._mtime_ns is None:
            return self._value  # type: ignore[return-value]
        return _opened(self._path, self._key, self._open)

    def head(self) -> T:
        """The file, of which only the size and the first 4096 bytes are right."""
        return self._load(head_file(self._path)) if self._mtime_ns is not None else self.get()

    def _open(self, path: Path) -> T:
        if self._path.stat().st_mtime_ns != self._mtime_ns:
            raise RemoteDataError(
                f"{self._path}: another run has found another version of it in the object store; start this run again"
            )
        return self._load(path)


def keep_open(path: Path, key: Hashable, load: Callable[[Path], T]) -> T:
    """The open file of a key, among the open files of this process.

    Args:
        path: of the file.
        key: of its version and of how it is opened.
        load: opens it by the path that it is given.

    Raises:
        RemoteDataError: it cannot be fetched.
    """
    if find_mirrored(path) is not None:
        return _opened(path, key, load)
    value: T = OPEN_FILES.get(key, lambda: load(path))
    return value


def _opened(path: Path, key: Hashable, load: Callable[[Path], T]) -> T:
    def open_file() -> tuple[T, LocalFile]:
        file = local_file(path)
        return load(file.path), file

    value: T = _OPENED.get(key, open_file)[0]
    return value
