"""A lock among the processes of a machine, so that one computes what is cached and the others wait for it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
from collections.abc import Iterator
from pathlib import Path

from internlm.utils.logging import get_logger
from internlm.utils.user_cache import user_cache

logger = get_logger(__name__)


@contextlib.contextmanager
def machine_lock(path: Path, purpose: str) -> Iterator[None]:
    """Hold the lock of a file and a purpose; released when the process ends, however it ends.

    Without a writable cache there is no lock, and each process does the work.
    """
    name = hashlib.sha256(f"{path.resolve()} {purpose}".encode()).hexdigest()[:16]
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            folder = user_cache() / "locks"
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(folder / f"{name}.lock", "w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("%s: waiting for another process of this machine: %s", path, purpose)
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield
