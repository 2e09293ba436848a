"""Files and folders by URL, with one interface for local disks and object stores.

Local files import nothing of an object store. Stores are in `local.py`, `s3.py` and `fsspec_store.py`; `urls.py` parses
URLs.
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
from internlm.utils.storage.store import Store, StoredFile
from internlm.utils.storage.streams import WriteStream
from internlm.utils.storage.urls import Location, locate


@dataclass(frozen=True)
class StoragePath:
    """A file or folder. Picklable: it holds only its URL; each process connects to the store on first use.

    All methods raise StorageError, which names URL, cause and fix, and MissingFileError when a file to be read does not
    exist. Transient errors of a transfer (a timeout, a dropped connection, a 5xx response) are retried for a bounded
    time first.

    Attributes:
        url: as the user wrote it, without trailing slashes; local paths without 'local:'. `storage_path` normalizes it.
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
        """The parent folder; the root of a store is its own parent."""
        if self.is_local:
            return StoragePath(str(self.local.parent))
        return StoragePath(self._location.url_of(self._location.key.rpartition("/")[0]))

    @property
    def is_local(self) -> bool:
        """Whether it is on a local disk (or a mounted network file system)."""
        return self._location.is_local

    @property
    def local(self) -> Path:
        """The path of a local file or folder."""
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
        """Whether it is a folder; in an object store, whether there is any object below it."""
        with named_failures(self._store, "look for", self.url):
            return self._store.is_folder(self._location.key)

    def names(self) -> list[str]:
        """Sorted names of the files and folders in this folder; empty when it does not exist."""
        with named_failures(self._store, "list", self.url):
            return sorted(self._store.names(self._location.key))

    def size(self) -> int:
        """Size of a file in bytes."""
        with named_failures(self._store, "read", self.url):
            return self._store.size(self._location.key)

    def version(self) -> str:
        """The version of a file; another one after each change of its content."""
        with named_failures(self._store, "read", self.url):
            return self._store.version(self._location.key)

    def files(self) -> list[StoredFile]:
        """The files at any depth below this folder, sorted by name; none when it does not exist."""
        with named_failures(self._store, "list", self.url):
            return sorted(self._store.files(self._location.key), key=lambda file: file.name)

    def open_read(self) -> BinaryIO:
        """Open a file for reading, with seeking; little more is fetched than is read."""
        return io.BufferedReader(self.open_unbuffered(), self._store.block_bytes)

    def open_unbuffered(self, version: str | None = None) -> io.RawIOBase:
        """Open a file, or only a version of it, for reading; each read is a request, or several for a large one.

        Raises:
            ReplacedFileError: the file has another version.
        """
        with named_failures(self._store, "read", self.url):
            return self._store.open_read(self._location.key, self.url, version)

    def open_write(self) -> WriteStream:
        """Open a file for sequential writing, replacing an existing one; its folder must exist.

        The file is complete once closed: a local file is then on disk, an object is visible in its store. An exception
        in its `with` block, or `abort()`, leaves no file.
        """
        with named_failures(self._store, "write", self.url):
            return WriteStream(self._store.open_write(self._location.key, self.url))

    def read_bytes(self) -> bytes:
        """The content of a file."""
        with self.open_read() as file:
            return file.read()

    def read_text(self) -> str:
        """The content of a UTF-8 file."""
        return self.read_bytes().decode("utf-8")

    def write_bytes(self, data: bytes) -> None:
        """Write a file."""
        with self.open_write() as file:
            file.write(data)

    def write_text(self, text: str) -> None:
        """Write a UTF-8 file."""
        self.write_bytes(text.encode("utf-8"))

    def make_folder(self) -> None:
        """Create a folder and its parents if they are missing; does nothing in an object store."""
        with named_failures(self._store, "make", self.url):
            self._store.make_folder(self._location.key)

    def remove(self) -> None:
        """Remove a file, or a folder and its content; no error when it does not exist."""
        with named_failures(self._store, "remove", self.url):
            self._store.remove(self._location.key)

    def rename_to(self, other: StoragePath) -> None:
        """Rename a local file or folder, atomically and durably."""
        with named_failures(self._store, f"rename to '{other}'", self.url):
            local.rename(self.local, other.local)


def storage_path(url: str | os.PathLike[str] | StoragePath) -> StoragePath:
    """The file or folder that a user means by `url`; doc/storage.md lists the spellings.

    Raises:
        ConfigError: the URL is malformed, its prefix is unknown, its package is not installed, or it begins with `~`
            and there is no home folder.
    """
    if isinstance(url, StoragePath):
        return url
    location = locate(expand_home(os.fspath(url)))
    location.open_store()
    return StoragePath(location.url_of(location.key))
