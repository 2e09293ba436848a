"""Files being written and read: what all stores share, and what each brings (`Sink`, `Source`)."""

from __future__ import annotations

import io
from abc import abstractmethod
from typing import Any

from internlm.utils.storage.failures import Explains, named_failures

# Small writes are collected in a buffer of this size; large ones pass it by.
BUFFER_BYTES = 1024 * 1024


class Sink(io.RawIOBase):
    """Where a file being written goes. It is kept when closed, unless it was given up or a write failed.

    A store brings `put`, `finish` and `discard`.
    """

    def __init__(self, store: Explains, url: str) -> None:
        self.store = store
        self.url = url
        self.given_up = False

    @abstractmethod
    def put(self, data: memoryview) -> int:
        """Take the next bytes; returns how many."""

    @abstractmethod
    def finish(self) -> None:
        """Make what was put last, and be seen."""

    @abstractmethod
    def discard(self) -> None:
        """Remove what was put, as well as can be."""

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        if self.given_up:
            # What was left in the buffer above.
            return len(view)
        try:
            with named_failures(self.store, "write", self.url):
                return self.put(view)
        except BaseException:
            self.given_up = True
            raise

    def close(self) -> None:
        if self.closed:
            return
        try:
            if not self.given_up:
                with named_failures(self.store, "write", self.url):
                    self.finish()
        except BaseException:
            self.given_up = True
            raise
        finally:
            super().close()
            if self.given_up:
                self.discard()


class WriteStream(io.BufferedWriter):
    """A file being written: complete when closed. It is given up by `abort` and by an exception in its `with`."""

    def __init__(self, sink: Sink) -> None:
        super().__init__(sink, BUFFER_BYTES)
        self._sink = sink

    def abort(self) -> None:
        """Give up: nothing of what was written stays. Does nothing after `close`."""
        self._sink.given_up = True
        self.close()

    def __exit__(self, kind: type[BaseException] | None, *details: Any) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def __del__(self) -> None:
        # Nobody closed it, so nobody said that it is complete.
        if not self.closed:
            self.abort()


class Source(io.RawIOBase):
    """A file being read, of which pieces are fetched. A store brings `fetch`.

    Args:
        size: of the file in bytes.
    """

    def __init__(self, store: Explains, url: str, size: int) -> None:
        self.store = store
        self.url = url
        self.size = size
        self._position = 0

    @abstractmethod
    def fetch(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer`, which is not longer than what follows `offset` in the file."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        if start + offset < 0:
            raise ValueError(f"cannot seek to {start + offset}, before the start of '{self.url}'")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        length = max(0, min(len(view), self.size - self._position))
        if length > 0:
            with named_failures(self.store, "read", self.url):
                self.fetch(self._position, view[:length])
            self._position += length
        return length

    def readall(self) -> bytes:
        data = bytearray(max(0, self.size - self._position))
        self.readinto(data)
        return bytes(data)
