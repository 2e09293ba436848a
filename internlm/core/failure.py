"""Ends all ranks when one fails, with the cause in every log.

A failing rank writes the cause into the job's key-value store and exits. On every rank, a thread polls the store. When
a cause appears and the rank does not exit by itself within a grace period (it may hang in a collective that will never
complete), the thread logs the cause and ends the process. This takes seconds; the timeouts of collectives are minutes.
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
"""Prefix of the cause on ranks that did not fail first."""


def describe_error(error: BaseException) -> str:
    """The class and message of an error, in one line."""
    message = "; ".join(line.strip() for line in str(error).splitlines() if line.strip()).replace(":; ", ": ")
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


class FailureWatch:
    """Shares the cause of a failure between the ranks of a job. In a run of one process it only formats it.

    A context manager around the work; call `report` when an exception leaves it.

    Args:
        rank: this rank.
        world_size: number of ranks; if more than one, the default process group must exist.

    Attributes:
        before_exit: called before a background thread ends a process whose main thread hangs.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.before_exit: Callable[[], None] = lambda: None
        self._store: Any = None
        if world_size > 1:
            # A separate connection: the thread must not wait behind a collective's use of the store.
            store: Any = dist.distributed_c10d._get_default_store()
            self._store = store.clone()
        self._first_cause: str | None = None
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
            # The others need time to read the cause: this process may hold the store.
            time.sleep(2 * POLL_SECONDS)
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def report(self, error: BaseException, phase: str) -> str:
        """Publish the cause of this rank's failure.

        Args:
            error: the exception.
            phase: what the rank was doing.

        Returns:
            The cause to log, in one line. If another rank failed first, it is that rank's: the error of this one is
            most likely a consequence (a closed connection).
        """
        cause = f"rank {self.rank} failed in phase '{phase}': {describe_error(error)}"
        if self._store is None:
            return cause
        self._has_reported = True
        try:
            # The first writer wins: compare_set stores only when the key is absent.
            first = self._store.compare_set(KEY, "", cause).decode()
        except Exception:  # the rank that holds the store is gone
            if self._first_cause is not None:
                return ECHO + self._first_cause
            return f"{cause} (the rank that held the job's store is gone: look at its log for the first cause)"
        return cause if first == cause else ECHO + first

    def declare(self, cause: str) -> None:
        """End the job, including this rank, for a cause found by a background thread."""

        def publish() -> None:
            with contextlib.suppress(Exception):  # the rank that holds the store is gone
                self._store.clone().compare_set(KEY, "", cause)

        # If the rank that holds the store is stopped, the request never returns.
        publisher = threading.Thread(target=publish, name="failure-declare", daemon=True)
        publisher.start()
        publisher.join(GRACE_SECONDS)
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
                cause = self._first_cause = self._store.get(KEY).decode()
            except Exception:
                cause = "the rank that held the job's store is gone"
            if self._stopped.wait(GRACE_SECONDS):
                return
            self._end(ECHO + cause)
