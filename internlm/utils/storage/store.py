"""What a store can do, and how its failures are named."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from internlm.utils.errors import MissingFileError, StorageError

if TYPE_CHECKING:
    from internlm.utils.storage.streams import Sink


@dataclass(frozen=True)
class Explanation:
    """Cause and fix of a failure, in words."""

    cause: str
    fix: str
    is_missing: bool = False


class Store(Protocol):
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

    def explain(self, error: Exception) -> Explanation | None:
        """What a failure means to a user; None for a defect of ours."""


@contextmanager
def named_failures(store: Store, action: str, url: str) -> Iterator[None]:
    """Turn failures of `store` into a StorageError: "cannot <action> '<url>': <cause>; <fix>"."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        explanation = store.explain(error)
        if explanation is None:
            raise
        kind = MissingFileError if explanation.is_missing else StorageError
        raise kind(f"cannot {action} '{url}': {explanation.cause}; {explanation.fix}") from error
