"""Stores that the fsspec library knows: memory:// (for tests and trials) and gs:// (Google Cloud Storage)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from internlm.utils.errors import ConfigError
from internlm.utils.storage.failures import Explanation
from internlm.utils.storage.store import Store
from internlm.utils.storage.streams import Sink, Source

PACKAGES = {"gs": "pip install 'internlm[gcs]'"}


@dataclass(frozen=True)
class FsspecPlace:
    """A file system of fsspec, and the bucket in it ('' when it has none)."""

    protocol: str
    bucket: str

    def open(self) -> Store:
        return _connect(self)


@functools.lru_cache
def _connect(place: FsspecPlace) -> FsspecStore:
    return FsspecStore(place)


class FsspecStore:
    """A bucket, or a whole file system, of fsspec."""

    block_bytes = 4 * 1024**2

    def __init__(self, place: FsspecPlace) -> None:
        self._place = place
        # Fail now when a package is missing.
        self.connect()

    def connect(self) -> Any:
        """The file system; fsspec keeps one for each process."""
        # Local files, the common case, do without this import.
        import fsspec

        try:
            # Other processes write too, so what a folder holds must not be remembered.
            return fsspec.filesystem(self._place.protocol, use_listings_cache=False)
        except ImportError as error:
            install = PACKAGES.get(self._place.protocol, "install the package that it names")
            raise ConfigError(f"'{self._place.protocol}://' needs a package: {error}. Fix: {install}") from error

    def path(self, key: str) -> str:
        """The path of a key inside the file system."""
        return f"{self._place.bucket}/{key}"

    def is_file(self, key: str) -> bool:
        return bool(self.connect().isfile(self.path(key)))

    def is_folder(self, key: str) -> bool:
        return bool(self.connect().isdir(self.path(key)))

    def names(self, key: str) -> list[str]:
        try:
            paths = self.connect().ls(self.path(key), detail=False)
        except FileNotFoundError:
            return []
        return [path.rstrip("/").rpartition("/")[2] for path in paths]

    def size(self, key: str) -> int:
        return int(self.connect().size(self.path(key)))

    def open_read(self, key: str, url: str) -> FsspecSource:
        return FsspecSource(self, key, url)

    def open_write(self, key: str, url: str) -> Sink:
        # fsspec's files in memory are seen from the start.
        return MemorySink(self, key, url) if self._place.protocol == "memory" else FsspecSink(self, key, url)

    def make_folder(self, key: str) -> None:
        self.connect().makedirs(self.path(key), exist_ok=True)

    def remove(self, key: str) -> None:
        path = self.path(key)
        if self.connect().exists(path):
            self.connect().rm(path, recursive=True)

    def explain(self, error: Exception) -> Explanation | None:
        if isinstance(error, FileNotFoundError):
            return Explanation("it does not exist", "check the spelling", is_missing=True)
        if isinstance(error, PermissionError):
            return Explanation(f"permission denied ({error})", "check the credentials and what they may do")
        # The libraries below fsspec have errors of their own, which have no common base.
        return Explanation(f"{type(error).__name__}: {error}", "check the URL, the network and the credentials")


class FsspecSource(Source):
    """A file being read."""

    def __init__(self, store: FsspecStore, key: str, url: str) -> None:
        super().__init__(store, url, store.size(key))
        # The buffer is above.
        self._file = store.connect().open(store.path(key), "rb", cache_type="none")

    def fetch(self, offset: int, buffer: memoryview) -> None:
        self._file.seek(offset)
        data = self._file.read(len(buffer))
        if len(data) < len(buffer):
            raise OSError(f"{len(data)} bytes came where {len(buffer)} were asked for")
        buffer[:] = data

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class FsspecSink(Sink):
    """A file being written, seen when finished."""

    def __init__(self, store: FsspecStore, key: str, url: str) -> None:
        super().__init__(store, url)
        self._file = store.connect().open(store.path(key), "wb", autocommit=False)

    def put(self, data: memoryview) -> int:
        self._file.write(data)
        return len(data)

    def finish(self) -> None:
        self._file.close()
        self._file.commit()

    def discard(self) -> None:
        self._file.discard()
        from fsspec.spec import AbstractBufferedFile

        if isinstance(self._file, AbstractBufferedFile):
            # Closing it, also when it is collected, would write what is left in its buffer.
            self._file.closed = True


class MemorySink(Sink):
    """A file being written to memory."""

    def __init__(self, store: FsspecStore, key: str, url: str) -> None:
        super().__init__(store, url)
        self._file_system = store.connect()
        self._path = store.path(key)
        self._data = bytearray()

    def put(self, data: memoryview) -> int:
        self._data += data
        return len(data)

    def finish(self) -> None:
        self._file_system.pipe_file(self._path, bytes(self._data))

    def discard(self) -> None:
        self._data.clear()
