"""Locks of files among the processes of a machine; released when a process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from internlm.utils.logging import get_logger

logger = get_logger(__name__)

_held: set[int] = set()
"""Descriptors of exclusive locks of this process. A forked process would hold the locks of its parent's threads."""


def _close_inherited() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_inherited)


@contextmanager
def locked(path: Path, purpose: str) -> Iterator[int]:
    """Hold the exclusive lock of a file, which is created; yields its descriptor.

    Its holder may rename or remove the file: those that wait for it then lock a new one.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        _held.add(descriptor)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.debug("waiting for another process: %s", purpose)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if is_same_file(path, descriptor):
                yield descriptor
                return
        finally:
            _held.discard(descriptor)
            os.close(descriptor)


def open_shared(path: Path) -> int | None:
    """Open a file with a shared lock, so that `remove_unused` leaves it; None if it does not exist."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if is_same_file(path, descriptor):
            return descriptor
        os.close(descriptor)


def remove_unused(path: Path) -> bool:
    """Remove a file unless a process has a lock on it; returns whether it is gone."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def is_same_file(path: Path, descriptor: int) -> bool:
    """Whether a descriptor is of the file that now has a path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
