"""Errors of stores, translated into StorageErrors with cause and fix."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from internlm.utils.errors import MissingFileError, ReplacedFileError, StorageError


@dataclass(frozen=True)
class Explanation:
    """Cause and fix of a failure, as text for the user."""

    cause: str
    fix: str
    is_missing: bool = False


class Explains(Protocol):
    """A store that can explain its own errors."""

    def explain(self, error: Exception) -> Explanation | None:
        """Cause and fix of an error; None for a defect of this project."""


class ReplacedError(Exception):
    """A file of a store is not the version that was asked for."""


@contextmanager
def named_failures(store: Explains, action: str, url: str) -> Iterator[None]:
    """Translate errors of `store` into a StorageError: "cannot <action> '<url>': <cause>; <fix>"."""
    try:
        yield
    except StorageError:
        raise
    except ReplacedError as error:
        raise ReplacedFileError(f"cannot {action} '{url}': it was replaced by another version") from error
    except Exception as error:
        explanation = store.explain(error)
        if explanation is None:
            raise
        kind = MissingFileError if explanation.is_missing else StorageError
        raise kind(f"cannot {action} '{url}': {explanation.cause}; {explanation.fix}") from error


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a disk or quota that is full."""


def storage_failure(error: BaseException) -> StorageError | None:
    """The StorageError hidden behind an error of a library; None when there is none.

    A library whose file fails during a write (torch.save) raises its own error in the clean-up; the cause is in the
    `__context__` of that error.
    """
    found = next((one for one in _chain(error) if isinstance(one, StorageError)), None)
    return found or full_disk(error)


def full_disk(error: BaseException) -> StorageError | None:
    """Like `storage_failure`, for a full disk only, which is never a defect, whatever error it is hidden behind."""
    full = next((one for one in _chain(error) if isinstance(one, OSError) and one.errno in FULL), None)
    if full is None:
        return None
    named = next((one for one in _chain(error) if isinstance(one, StorageError) and one.__cause__ is full), None)
    return named or StorageError(_write_failure(full))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, its causes, and the errors during whose handling it was raised."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        current = waiting.pop()
        if id(current) not in seen:
            seen.add(id(current))
            yield current
            waiting += [other for other in (current.__context__, current.__cause__) if other is not None]


def _write_failure(error: OSError) -> str:
    where = f"'{error.filename}'" if error.filename else "a file"
    why = (error.strerror or str(error)).lower()
    return f"cannot write {where}: {why}; free space on that disk (or in your quota), or choose another folder"
