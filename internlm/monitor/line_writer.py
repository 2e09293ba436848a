"""Appends lines to a file without failing: lines that a full disk rejects wait in memory and are written later."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path

from internlm.utils.logging import get_logger
from internlm.utils.storage import full_disk

MAX_WAITING = 100_000
"""Maximum number of lines that wait in memory. Older ones are dropped, and their number is logged."""

logger = get_logger(__name__)


class LineWriter:
    """Appends whole lines, unbuffered. Lines that cannot be written are retried with the next one.

    Args:
        path: the file, created if missing.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._end = os.fstat(self._file.fileno()).st_size
        self._waiting: deque[bytes] = deque()
        self._num_lost = 0
        self._failed = False

    def write(self, line: str) -> None:
        """Append `line` and a line break."""
        self._waiting.append(line.encode("utf-8") + b"\n")
        if len(self._waiting) > MAX_WAITING:
            self._waiting.popleft()
            self._num_lost += 1
        self._write_waiting()

    def close(self) -> None:
        """Write the waiting lines, log the number of lost ones and close the file."""
        self._write_waiting()
        self._file.close()
        num_lost = self._num_lost + len(self._waiting)
        if num_lost:
            logger.error("%s: %d lines could not be written and are lost", self._path, num_lost)
        self._waiting.clear()

    def _write_waiting(self) -> None:
        try:
            while self._waiting:
                self._append(self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            if not self._failed:
                error.filename = error.filename or str(self._path)
                logger.error("%s; lines wait in memory, and the run continues", full_disk(error) or error)
            self._failed = True
            return
        if self._failed:
            logger.info("%s can be written again; the waiting lines were appended", self._path)
        self._failed = False

    def _append(self, line: bytes) -> None:
        written = 0
        try:
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError:
            # Remove a partial line, so that the file contains whole lines only.
            os.ftruncate(self._file.fileno(), self._end)
            raise
        self._end += len(line)
