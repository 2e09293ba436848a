"""Displays the progress of tokenization: a bar on a terminal, a line every 10 seconds otherwise."""

from __future__ import annotations

import sys
import time
from types import TracebackType

_SECONDS_BETWEEN_LINES = 10.0


class TokenizeProgress:
    """Shows MB, MB/s and tokens on stderr.

    Args:
        total_bytes: size of the input in bytes.
    """

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.done_bytes = self.fresh_bytes = self.tokens = 0
        self._start_time = self._last_line = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("tokenizing"), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("", total=total_bytes)

    def advance(self, num_bytes: int, tokens: int, resumed: bool = False) -> None:
        """Count finished input; input finished by an earlier call (`resumed`) does not count for the speed."""
        self.done_bytes += num_bytes
        self.fresh_bytes += 0 if resumed else num_bytes
        self.tokens += tokens
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done_bytes, description=self._text())
        elif time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            print(f"tokenizing: {self._text()}", file=sys.stderr, flush=True)

    @property
    def megabytes_per_second(self) -> float:
        """Speed of this call, in 10^6 bytes of input per second."""
        return self.fresh_bytes / 1e6 / max(time.monotonic() - self._start_time, 1e-9)

    def _text(self) -> str:
        return (
            f"{self.done_bytes / 1e6:,.0f} of {self.total_bytes / 1e6:,.0f} MB, "
            f"{self.megabytes_per_second:.1f} MB/s, {self.tokens:,} tokens"
        )

    def __enter__(self) -> TokenizeProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
