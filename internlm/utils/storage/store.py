"""The protocol of a store."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from internlm.utils.storage.failures import Explains
from internlm.utils.storage.streams import Sink


@dataclass(frozen=True)
class StoredFile:
    """A file of a store in its present version.

    Attributes:
        name: relative to the folder that was listed.
        size: in bytes.
        version: another one after each change of the content, such as an ETag.
    """

    name: str
    size: int
    version: str


class Store(Explains, Protocol):
    """One disk, bucket or file system. Methods raise the store's own errors; `explain` translates them.

    A key is a path below the root of the store, without leading or trailing slashes. URLs are only for messages.

    Attributes:
        block_bytes: buffer size of reads: smaller reads fetch a block of this size, larger ones bypass the buffer.
    """

    block_bytes: int

    def is_file(self, key: str) -> bool: ...

    def is_folder(self, key: str) -> bool:
        """Whether the folder exists; in an object store, whether there is any object below it."""

    def names(self, key: str) -> list[str]:
        """Names of the files and folders in a folder, in any order; empty when it does not exist."""

    def files(self, key: str) -> Iterable[StoredFile]:
        """The files at any depth below a folder, in any order; none when it does not exist."""

    def size(self, key: str) -> int: ...

    def version(self, key: str) -> str:
        """See `StoredFile`."""

    def open_read(self, key: str, url: str, version: str | None = None) -> io.RawIOBase:
        """Open a file; with a version, only that one.

        Raises:
            ReplacedError: the file has another version.
        """

    def open_write(self, key: str, url: str) -> Sink: ...

    def make_folder(self, key: str) -> None:
        """Create a folder and its parents; does nothing in an object store."""

    def remove(self, key: str) -> None:
        """Remove a file, or a folder and its content; no error when it does not exist."""
