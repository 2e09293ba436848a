"""Open files and decoded blocks, kept for a process up to a limit, whatever the number of files of a dataset."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

T = TypeVar("T")

MAX_OPEN_FILES = 128
MAX_BLOCK_BYTES = 256 * 2**20


class ProcessCache(Generic[T]):
    """The most recently used values of this process; a forked process starts with none. Thread-safe.

    Args:
        limit: on the sum of the sizes. The latest value is kept even if it is larger.
        size: of a value.
    """

    def __init__(self, limit: int, size: Callable[[T], int]) -> None:
        self.limit, self._size = limit, size
        self._clear()
        # A lock that another thread held during the fork would never be released in the new process.
        os.register_at_fork(after_in_child=self._clear)

    def _clear(self) -> None:
        self._lock = threading.Lock()
        self._values: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()
        self._total = 0

    def __len__(self) -> int:
        return len(self._values)

    def drop_all(self) -> None:
        """Drop all values."""
        with self._lock:
            self._values.clear()
            self._total = 0

    def get(self, key: Hashable, load: Callable[[], T]) -> T:
        """Return the value of a key, loaded if it is not there.

        A value that is dropped closes itself when the last reference to it ends, so another thread may still use it.
        """
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key][0]
        value = load()
        size = self._size(value)
        with self._lock:
            if key not in self._values:
                self._values[key] = (value, size)
                self._total += size
            while self._total > self.limit and len(self._values) > 1:
                self._total -= self._values.popitem(last=False)[1][1]
        return value


OPEN_FILES: ProcessCache[Any] = ProcessCache(MAX_OPEN_FILES, lambda file: 1)
"""Open files of all formats."""

BLOCKS: ProcessCache[Any] = ProcessCache(MAX_BLOCK_BYTES, lambda table: int(table.nbytes))
"""Decoded blocks of all files, pyarrow tables."""
