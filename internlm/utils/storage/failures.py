"""How the failures of a store are named."""

from __future__ import annotations

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
