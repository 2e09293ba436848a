"""Fetches files of mirrors before they are read, in a thread of the process that will read them."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path

from internlm.data.remote.fetching import fetch
from internlm.data.remote.local_file import find_mirrored
from internlm.utils.errors import RemoteDataError
from internlm.utils.logging import get_logger

logger = get_logger(__name__)


class FetchAhead:
    """A queue of files to fetch, and the thread that fetches them; one for each process."""

    def __init__(self) -> None:
        self._pid = 0
        self._waiting: deque[Path] = deque()

    def __getstate__(self) -> dict[str, object]:
        return {"_pid": 0, "_waiting": deque()}

    @property
    def is_started(self) -> bool:
        """Whether this process has requested files."""
        return self._pid == os.getpid()

    def request(self, paths: Sequence[Path]) -> None:
        """Fetch these files in this order, and no longer those of an earlier request.

        Processes of a machine begin at different files, so that each fetches some of them.
        """
        is_first = not self.is_started
        if is_first:
            self._pid, self._waiting = os.getpid(), deque()
            self._wakeup = threading.Event()
        first = os.getpid() % len(paths) if paths else 0
        self._waiting.clear()
        self._waiting.extend([*paths[first:], *paths[:first]])
        self._wakeup.set()
        if is_first:
            threading.Thread(target=self._run, name="data-fetch-ahead", daemon=True).start()

    def _run(self) -> None:
        while True:
            self._wakeup.wait()
            self._wakeup.clear()
            while self._waiting:
                try:
                    path = self._waiting.popleft()
                except IndexError:  # a new request has taken its place
                    break
                found = find_mirrored(path)
                try:
                    if found is not None:
                        fetch(*found)
                except RemoteDataError as error:
                    # The reader gets the same error if it lasts until the file is needed.
                    logger.warning("cannot fetch ahead of need: %s", error)
                    break


def size_to_fetch(paths: Iterable[Path]) -> tuple[int, int | None]:
    """(bytes of the large files of mirrors among files, bound of their cache or None)."""
    total, bound = 0, None
    for path in paths:
        found = find_mirrored(path)
        if found is not None:
            mirror, name = found
            total, bound = total + mirror.files[name].size, mirror.max_bytes
    return total, bound
