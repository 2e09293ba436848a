"""When one rank fails, all stop, and everyone's log says why.

A rank that fails writes the cause into the job's key-value store and ends. Every rank has a thread that looks there;
when a cause appears and its own rank has not ended by itself within a grace period (it may hang in a collective that
will never complete), the thread logs the cause and ends the process. The collectives' own timeouts are minutes; this
takes seconds.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from internlm.utils.logging import get_logger

KEY = "internlm/failure"
POLL_SECONDS = 1.0
GRACE_SECONDS = 5.0
EXIT_CODE = 1
ECHO = "stopped because "
"""How the cause begins on a rank that did not fail first."""


def describe_error(error: BaseException) -> str:
    """Class and message of an error in one line."""
    message = "; ".join(line.strip() for line in str(error).splitlines() if line.strip()).replace(":; ", ": ")
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


class FailureWatch:
    """Shares the cause of a failure between the ranks of a job. With one process it only logs.

    Use as a context manager around the work; call `report` when an exception leaves it.

    Attributes:
        before_exit: called before the process is ended from outside of its main thread, which hangs.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.before_exit: Callable[[], None] = lambda: None
        self._store: Any = None
        if world_size > 1:
            # A connection of its own: the watching thread must not wait behind a collective's use of the store.
            store: Any = dist.distributed_c10d._get_default_store()
            self._store = store.clone()
        self._has_reported = False
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> FailureWatch:
        if self._store is not None:
            self._thread = threading.Thread(target=self._watch, name="failure-watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._has_reported:
            # Give the others a moment to read the cause: this process may hold the store.
            time.sleep(2 * POLL_SECONDS)
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def report(self, error: BaseException, phase: str) -> str:
        """Tell all ranks why this one fails; returns the cause, one line, to be logged last.

        When another rank failed first, this rank's error is most likely a consequence (a closed connection), and the
        other rank's cause is returned.
        """
        cause = f"rank {self.rank} failed in phase '{phase}': {describe_error(error)}"
        if self._store is None:
            return cause
        self._has_reported = True
        try:
            # The first writer wins: compare_set stores only when the key is absent.
            first = self._store.compare_set(KEY, "", cause).decode()
        except Exception:  # the rank that holds the store is gone
            return f"{cause} (the rank that held the job's store is gone: look at its log for the first cause)"
        return cause if first == cause else ECHO + first

    def declare(self, cause: str) -> None:
        """End the job, this rank included, for a cause that a thread beside the main one has found."""

        def tell() -> None:
            with contextlib.suppress(Exception):  # the rank that holds the store is gone
                self._store.clone().compare_set(KEY, "", cause)

        # Where the rank that holds the store is stopped, it takes the cause and never answers.
        telling = threading.Thread(target=tell, name="failure-declare", daemon=True)
        telling.start()
        telling.join(GRACE_SECONDS)
        self._stopped.wait(GRACE_SECONDS)
        self._end(cause)

    def _end(self, message: str) -> None:
        self.before_exit()
        get_logger(__name__).error("%s", message)
        sys.stderr.flush()
        os._exit(EXIT_CODE)

    def _watch(self) -> None:
        assert self._store is not None
        while not self._stopped.wait(POLL_SECONDS):
            try:
                if not self._store.check([KEY]):
                    continue
                cause = self._store.get(KEY).decode()
            except Exception:
                cause = "the rank that held the job's store is gone"
            if self._stopped.wait(GRACE_SECONDS):
                return
            self._end(ECHO + cause)
