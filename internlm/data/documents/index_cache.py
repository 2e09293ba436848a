"""The cache of what is computed once for a file of documents, beside the file or in the user's cache.

The name of a cached file depends on everything that its content depends on. One process builds it under a lock while
others wait. Where the file system has no locks, several may build the same one at once: each writes a temporary file
and renames it.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from internlm.utils.errors import DataError
from internlm.utils.file_lock import locked
from internlm.utils.npy_files import map_npy
from internlm.utils.user_cache import user_cache

CACHE_FOLDER = ".index_cache"
_FORMAT_VERSION = 3


class IndexedFile(Protocol):
    """A file that an index is made of; see `DocumentFile`."""

    @property
    def path(self) -> Path: ...

    @property
    def inputs(self) -> Sequence[Path]: ...

    @property
    def reading(self) -> str: ...


def _cache_name(file: IndexedFile, kind: str, suffix: str) -> str:
    parts: list[object] = [_FORMAT_VERSION, kind, file.path.name, file.reading]
    for each in file.inputs:
        status = each.stat()
        parts += [status.st_size, status.st_mtime_ns]
    return f"{file.path.stem}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}-{kind}{suffix}"


def _cache_folders(path: Path) -> list[Path]:
    """The cache folder beside the data, and the one in the user's cache for data on a read-only disk."""
    folder_hash = hashlib.sha256(str(path.parent.resolve()).encode()).hexdigest()[:16]
    return [path.parent / CACHE_FOLDER, user_cache() / "index" / folder_hash]


def cached(file: IndexedFile, kind: str, suffix: str) -> Path | None:
    """The cached index of a kind of the present version of a file, if there is one."""
    name = _cache_name(file, kind, suffix)
    candidates = (folder / name for folder in _cache_folders(file.path))
    return next((path for path in candidates if path.is_file() and os.access(path, os.R_OK)), None)


def cached_or_built(file: IndexedFile, kind: str, suffix: str, write: Callable[[Path], object]) -> Path:
    """The cached index of a kind of the present version of a file, built by one process if there is none.

    Args:
        file: that the index is made of.
        kind: part of the cached file's name; everything but the file that its content depends on.
        suffix: of the cached file.
        write: writes the index to a path.

    Raises:
        DataError: no cache folder is writable.
    """
    found = cached(file, kind, suffix)
    if found is None:
        with locked_index(file, kind):
            # Another process may have built it before this one got the lock.
            found = cached(file, kind, suffix) or store(file, kind, suffix, write)
    return found


def cached_or_built_array(file: IndexedFile, kind: str, write: Callable[[Path], object]) -> NDArray[np.int64]:
    """The array of a cached `.npy` file, memory-mapped; see `cached_or_built`.

    Raises:
        DataError: no cache folder is writable, or the cached file is damaged.
    """
    path = cached_or_built(file, kind, ".npy", write)
    return map_npy(path, f"remove it: the index of {file.path} is then built again")


@contextmanager
def locked_index(file: IndexedFile, kind: str) -> Iterator[None]:
    """Hold the lock of an index, in the first cache folder that has locks; without one if there is none."""
    name = f".lock-{_cache_name(file, kind, '')}"
    with ExitStack() as stack:
        for folder in _cache_folders(file.path):
            with suppress(OSError):  # read-only, or a network file system without locks
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(folder / name, f"builds the index {kind} of {file.path}"))
                stack.callback((folder / name).unlink, missing_ok=True)
                break
        yield


def store(file: IndexedFile, kind: str, suffix: str, write: Callable[[Path], object]) -> Path:
    """Write an index of a kind to the cache.

    Raises:
        DataError: no cache folder is writable.
    """
    name = _cache_name(file, kind, suffix)
    failures = []
    for folder in _cache_folders(file.path):
        # Not tempfile, whose files only their owner can read: data is shared between users.
        temporary = folder / f".tmp-{os.getpid()}-{secrets.token_hex(8)}{suffix}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write(temporary)
            os.replace(temporary, folder / name)
            return folder / name
        except OSError as error:
            failures.append(str(error))
            if folder.is_dir():
                temporary.unlink(missing_ok=True)
    raise DataError(
        f"{file.path}: the index can be written neither beside the file nor in the user's cache "
        f"({'; '.join(failures)}). Set XDG_CACHE_HOME to a writable folder"
    )
