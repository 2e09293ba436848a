"""A file or folder by its URL, the same on a local disk and in an object store.

Local files are plain files; nothing of an object store is imported for them. What differs between the kinds of store is
in `local.py`, `s3.py` and `fsspec_store.py`, how a URL is read in `urls.py`.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from internlm.utils.paths import expand_home
from internlm.utils.storage import local
from internlm.utils.storage.failures import named_failures
from internlm.utils.storage.store import Store
from internlm.utils.storage.streams import WriteStream
from internlm.utils.storage.urls import Location, locate


@dataclass(frozen=True)
class StoragePath:
    """A file or folder. Picklable: it holds its URL alone, and each process connects to the store on first use.

    All methods raise StorageError, which names the URL, the cause and the fix; MissingFileError for what is to be read
    and does not exist. Transfers that fail for a passing reason (a timeout, a cut connection, a 5xx answer) are
    repeated for a bounded time before that.

    Attributes:
        url: as the user wrote it, without slashes at the end; local paths without 'local:'. Made by `storage_path`.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> StoragePath:
        """A file or folder below this one."""
        location = self._location
        return StoragePath(location.url_of(f"{location.key.rstrip('/')}/{name}" if location.key else name))

    @property
    def name(self) -> str:
        """The last part; empty for the root of a store."""
        return self._location.key.rpartition("/")[2]

    @property
    def parent(self) -> StoragePath:
        """The folder that this is in; the root of a store is its own parent."""
        if self.is_local:
            return StoragePath(str(self.local.parent))
        return StoragePath(self._location.url_of(self._location.key.rpartition("/")[0]))

    @property
    def is_local(self) -> bool:
        """Whether it is on a local disk (or a network file system mounted as one)."""
        return self._location.is_local

    @property
    def local(self) -> Path:
        """The path of what is on a local disk."""
        assert self.is_local, self.url
        return Path(self.url)

    @property
    def _location(self) -> Location:
        return locate(self.url)

    @property
    def _store(self) -> Store:
        return self._location.open_store()

    def exists(self) -> bool:
        """Whether it is a file or a folder."""
        return self.is_file() or self.is_folder()

    def is_file(self) -> bool:
        """Whether it is a file."""
        with named_failures(self._store, "look for", self.url):
            return self._store.is_file(self._location.key)

    def is_folder(self) -> bool:
        """Whether it is a folder. Object stores have none but those that something lies in."""
        with named_failures(self._store, "look for", self.url):
            return self._store.is_folder(self._location.key)

    def names(self) -> list[str]:
        """Names of the files and folders in this folder, sorted; none when it does not exist."""
        with named_failures(self._store, "list", self.url):
            return sorted(self._store.names(self._location.key))

    def size(self) -> int:
        """Size of a file in bytes."""
        with named_failures(self._store, "read", self.url):
            return self._store.size(self._location.key)

    def open_read(self) -> BinaryIO:
        """Open a file to read. It can seek, and little more is fetched than what is read."""
        with named_failures(self._store, "read", self.url):
            return io.BufferedReader(self._store.open_read(self._location.key, self.url), self._store.block_bytes)

    def open_write(self) -> WriteStream:
        """Open a new file to write in one go, in place of an older one; make the folder before.

        It counts when closed: a local file is then on disk, and an object in a store visible. An exception in its
        `with`, or `abort()`, leaves nothing.
        """
        with named_failures(self._store, "write", self.url):
            return WriteStream(self._store.open_write(self._location.key, self.url))

    def read_bytes(self) -> bytes:
        """All of a file."""
        with self.open_read() as file:
            return file.read()

    def read_text(self) -> str:
        """All of a file in UTF-8."""
        return self.read_bytes().decode("utf-8")

    def write_bytes(self, data: bytes) -> None:
        """Write a whole file."""
        with self.open_write() as file:
            file.write(data)

    def write_text(self, text: str) -> None:
        """Write a whole file in UTF-8."""
        self.write_bytes(text.encode("utf-8"))

    def make_folder(self) -> None:
        """Make a folder and its parents, if need be. In an object store there is nothing to make."""
        with named_failures(self._store, "make", self.url):
            self._store.make_folder(self._location.key)

    def remove(self) -> None:
        """Remove a file, or a folder with all in it; no error when there is none."""
        with named_failures(self._store, "remove", self.url):
            self._store.remove(self._location.key)

    def rename_to(self, other: StoragePath) -> None:
        """Give a local file or folder another name, in one instant and lastingly."""
        with named_failures(self._store, f"rename to '{other}'", self.url):
            local.rename(self.local, other.local)


def storage_path(url: str | os.PathLike[str] | StoragePath) -> StoragePath:
    """The file or folder that a user means by `url`; doc/storage.md lists the spellings.

    Raises:
        ConfigError: the URL cannot be read, its prefix is unknown, the package for it is not installed, or it begins
            with `~` and there is no home.
    """
    if isinstance(url, StoragePath):
        return url
    location = locate(expand_home(os.fspath(url)))
    location.open_store()
    return StoragePath(location.url_of(location.key))
