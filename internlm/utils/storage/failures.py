"""How the failures of a store are named."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from internlm.utils.errors import MissingFileError, StorageError


@dataclass(frozen=True)
class Explanation:
    """Cause and fix of a failure, in words."""

    cause: str
    fix: str
    is_missing: bool = False


class Explains(Protocol):
    """Knows what its failures mean."""

    def explain(self, error: Exception) -> Explanation | None:
        """What a failure means to a user; None for a defect of ours."""


@contextmanager
def named_failures(store: Explains, action: str, url: str) -> Iterator[None]:
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


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a disk says that takes no more."""


def storage_failure(error: BaseException) -> StorageError | None:
    """The failure of a disk or store that lies behind an error of a library which hides it; None when there is none.

    A library that is writing when its file fails (torch.save) raises an error of its own from the clean-up, whose
    `__context__` has the reason.
    """
    found = next((one for one in _behind(error) if isinstance(one, StorageError)), None)
    return found or full_disk(error)


def full_disk(error: BaseException) -> StorageError | None:
    """The same, but only of a disk that takes no more: ours is never such a failure, whatever was raised behind it."""
    full = next((one for one in _behind(error) if isinstance(one, OSError) and one.errno in FULL), None)
    if full is None:
        return None
    named = next((one for one in _behind(error) if isinstance(one, StorageError) and one.__cause__ is full), None)
    return named or StorageError(_told(full))


def _behind(error: BaseException) -> Iterator[BaseException]:
    """An error, and all that it was raised from or while handling."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        one = waiting.pop()
        if id(one) not in seen:
            seen.add(id(one))
            yield one
            waiting += [other for other in (one.__context__, one.__cause__) if other is not None]


def _told(error: OSError) -> str:
    where = f"'{error.filename}'" if error.filename else "a file"
    why = (error.strerror or str(error)).lower()
    return f"cannot write {where}: {why}; free space on that disk (or in your quota), or choose another folder"
