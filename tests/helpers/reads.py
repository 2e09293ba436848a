"""How much this process reads from files on a local disk: what leaves the disk, not what is asked of a buffer."""

from __future__ import annotations

from typing import Any

from internlm.utils.storage.local import LocalSource


class CountReads:
    """While open, counts.

    Attributes:
        num_bytes: read since it was opened.
    """

    def __enter__(self) -> CountReads:
        self.num_bytes, self._real = 0, LocalSource.readinto

        def readinto(source: LocalSource, buffer: Any) -> int:
            count = self._real(source, buffer)
            self.num_bytes += count
            return count

        LocalSource.readinto = readinto  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        LocalSource.readinto = self._real  # type: ignore[method-assign]
