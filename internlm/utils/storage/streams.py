"""Streams for reading and writing files: what all stores share, and the base classes of their own streams."""

from __future__ import annotations

import io
from abc import abstractmethod
from typing import Any

from internlm.utils.storage.failures import Explains, named_failures

# Small writes are collected in a buffer of this size; larger ones bypass it.
BUFFER_BYTES = 1024 * 1024


class Sink(io.RawIOBase):
    """The raw stream of a file being written. Closing it commits the file, unless it was aborted or a write failed.

    A store implements `put`, `finish` and `discard`.

    Attributes:
        is_aborted: whether the file is to be discarded.
    """

    def __init__(self, store: Explains, url: str) -> None:
        self.store = store
        self.url = url
        self.is_aborted = False

    @abstractmethod
    def put(self, data: memoryview) -> int:
        """Write the next bytes; returns how many were written."""

    @abstractmethod
    def finish(self) -> None:
        """Commit the file: make it durable and visible."""

    @abstractmethod
    def discard(self) -> None:
        """Remove what was written, as far as possible."""

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        if self.is_aborted:
            # The rest of the buffer around this stream.
            return len(view)
        try:
            with named_failures(self.store, "write", self.url):
                return self.put(view)
        except BaseException:
            self.is_aborted = True
            raise

    def close(self) -> None:
        if self.closed:
            return
        try:
            if not self.is_aborted:
                with named_failures(self.store, "write", self.url):
                    self.finish()
        except BaseException:
            self.is_aborted = True
            raise
        finally:
            super().close()
            if self.is_aborted:
                self.discard()


class WriteStream(io.BufferedWriter):
    """A file being written: complete once closed. `abort`, or an exception in its `with` block, discards it."""

    def __init__(self, sink: Sink) -> None:
        super().__init__(sink, BUFFER_BYTES)
        self._sink = sink

    def abort(self) -> None:
        """Discard everything written. Does nothing after `close`."""
        self._sink.is_aborted = True
        self.close()

    def __exit__(self, kind: type[BaseException] | None, *details: Any) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def __del__(self) -> None:
        # Never closed, so never complete.
        if not self.closed:
            self.abort()


class Source(io.RawIOBase):
    """The raw stream of a file being read, range by range. A store implements `fetch`.

    Args:
        store: explains errors.
        url: for messages.
        size: of the file in bytes.
    """

    def __init__(self, store: Explains, url: str, size: int) -> None:
        self.store = store
        self.url = url
        self.size = size
        self._position = 0

    @abstractmethod
    def fetch(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset` on; the file is long enough."""

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
