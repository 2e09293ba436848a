"""Stores behind the fsspec library: memory:// (for tests and trials) and gs:// (Google Cloud Storage)."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from internlm.utils.errors import ConfigError
from internlm.utils.storage.failures import Explanation, ReplacedError
from internlm.utils.storage.store import Store, StoredFile
from internlm.utils.storage.streams import Sink, Source

PACKAGES = {"gs": "pip install 'internlm[gcs]'"}


@dataclass(frozen=True)
class FsspecAddress:
    """A file system of fsspec, and a bucket in it ('' when it has none)."""

    protocol: str
    bucket: str

    def open(self) -> Store:
        return _connect(self)


@functools.lru_cache
def _connect(address: FsspecAddress) -> FsspecStore:
    return FsspecStore(address)


class FsspecStore:
    """A bucket, or a whole file system, of fsspec."""

    block_bytes = 4 * 1024**2

    def __init__(self, address: FsspecAddress) -> None:
        self._address = address
        # A missing package fails here, not at first use.
        self.connect()

    def connect(self) -> Any:
        """The file system; fsspec caches one per process."""
        # Local files, the common case, do not need this import.
        import fsspec

        try:
            # Other processes write too: listings must not be cached.
            return fsspec.filesystem(self._address.protocol, use_listings_cache=False)
        except ImportError as error:
            install = PACKAGES.get(self._address.protocol, "install that package")
            raise ConfigError(f"'{self._address.protocol}://' needs a package: {error}. Fix: {install}") from error

    def path(self, key: str) -> str:
        """The path of a key inside the file system."""
        return f"{self._address.bucket}/{key}"

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

    def files(self, key: str) -> Iterator[StoredFile]:
        root = self.path(key)
        for path, info in self.connect().find(root, detail=True).items():
            name = path.strip("/").removeprefix(root.strip("/")).strip("/")
            if name:
                yield StoredFile(name, int(info["size"]), info.get("etag") or self._version(path))

    def version(self, key: str) -> str:
        return self._version(self.path(key))

    def _version(self, path: str) -> str:
        """The ETag of a file or, in memory, the time of its last change."""
        info = self.connect().info(path)
        return str(info.get("etag") or info["created"])

    def open_read(self, key: str, url: str, version: str | None = None) -> FsspecSource:
        if version is not None and self.version(key) != version:
            raise ReplacedError(key)
        return FsspecSource(self, key, url)

    def open_write(self, key: str, url: str) -> Sink:
        # fsspec's in-memory files are visible from the start.
        return MemorySink(self, key, url) if self._address.protocol == "memory" else FsspecSink(self, key, url)

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
        # The libraries below fsspec raise errors of their own, without a common base class.
        return Explanation(f"{type(error).__name__}: {error}", "check the URL, the network and the credentials")


class FsspecSource(Source):
    """A file being read."""

    def __init__(self, store: FsspecStore, key: str, url: str) -> None:
        super().__init__(store, url, store.size(key))
        # Buffered by the reader around this object.
        self._file = store.connect().open(store.path(key), "rb", cache_type="none")

    def fetch(self, offset: int, buffer: memoryview) -> None:
        self._file.seek(offset)
        data = self._file.read(len(buffer))
        if len(data) < len(buffer):
            raise OSError(f"received {len(data)} of {len(buffer)} requested bytes")
        buffer[:] = data

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class FsspecSink(Sink):
    """A file being written, visible once finished."""

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
            # `close`, which the garbage collector calls too, would write the rest of its buffer.
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
