"""A digest of the files of a source, to notice others: on another rank, or when a run resumes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def digest_of(files: Iterable[tuple[str, object]]) -> str:
    """A digest of names and sizes of files; not of their places, which may differ between machines.

    Args:
        files: (name, sizes) in reading order.
    """
    return hashlib.sha256(repr(list(files)).encode()).hexdigest()[:16]
