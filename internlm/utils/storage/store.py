"""What a store can do."""

from __future__ import annotations

import io
from typing import Protocol

from internlm.utils.storage.failures import Explains
from internlm.utils.storage.streams import Sink


class Store(Explains, Protocol):
    """One disk, bucket or file system. Methods raise the store's own errors; `explain` says what they mean.

    A key is a path below the store's root, without slashes at its ends. URLs are only for messages.

    Attributes:
        block_bytes: small reads are answered from a block of this size, which is fetched; larger reads pass it by.
    """

    block_bytes: int

    def is_file(self, key: str) -> bool: ...

    def is_folder(self, key: str) -> bool:
        """Whether the folder exists; in an object store: whether anything lies below it."""

    def names(self, key: str) -> list[str]:
        """Names of the files and folders in a folder, in any order; none when it does not exist."""

    def size(self, key: str) -> int: ...

    def open_read(self, key: str, url: str) -> io.RawIOBase: ...

    def open_write(self, key: str, url: str) -> Sink: ...

    def make_folder(self, key: str) -> None:
        """Make a folder and its parents; object stores have none and do nothing."""

    def remove(self, key: str) -> None:
        """Remove a file, or a folder with all in it; no error when there is none."""
