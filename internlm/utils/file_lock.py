"""Locks of files among the processes of a machine; released when a process ends, however it ends."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
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
def locked(path: Path, purpose: str, *, level: int = logging.DEBUG) -> Iterator[int]:
    """Hold the exclusive lock of a file, which is created; yields its descriptor.

    Its holder may rename or remove the file: those that wait for it then lock a new one.

    Args:
        path: the file; its folder exists.
        purpose: what its holder does, for the log of those that wait.
        level: of that line.

    Raises:
        OSError: the file cannot be written, or its file system has no locks.
    """
    while True:
        # Writable for all: data is shared between users.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        _held.add(descriptor)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.log(level, "waiting for another process of this machine: %s", purpose)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if is_same_file(path, descriptor):
                yield descriptor
                return
        finally:
            _held.discard(descriptor)
            os.close(descriptor)


@contextmanager
def locked_if_possible(path: Path, purpose: str) -> Iterator[None]:
    """Hold the exclusive lock of a file, or none where there are no locks: each process then does the work itself."""
    with ExitStack() as stack:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(path, purpose, level=logging.INFO))
            stack.callback(path.unlink, missing_ok=True)
        yield


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
