"""Runs and times a training loop in rounds of steps, on request.

A loop calls `step_done` after each of its steps. Between rounds that call blocks, so that the loops of several
processes alternate. Each line of input starts a round; each line of output is its result.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

import torch


class Finished(Exception):  # noqa: N818  the end of a loop is not an error
    """There are no more rounds."""


class Pacer:
    """Measures the loop of this process.

    Args:
        out: receives results, one JSON object per line.
        device: synchronized at both ends of a round.
        warmup: steps before the first round.
        about: reported when the loop is ready.

    Attributes:
        facts: set by the loop, and reported when it is ready.
        data_seconds: time spent waiting for batches, added by the loop.
    """

    def __init__(self, out: TextIO, device: torch.device, warmup: int, about: dict[str, Any]) -> None:
        self.device = device
        self._about = about
        self.facts: dict[str, Any] = {}
        self.data_seconds = 0.0
        self._out = out
        self._before = _host_memory("VmRSS") if device.type == "cpu" else 0
        self._started = time.perf_counter()
        self._left = warmup
        self._steps = 0

    @property
    def is_warming_up(self) -> bool:
        """Whether no round has started."""
        return self._steps == 0

    def step_done(self) -> None:
        """Count a step; blocks until the next one is requested.

        Raises:
            Finished: there are no more rounds.
        """
        self._left -= 1
        if self._left > 0:
            return
        self.wait()
        seconds = time.perf_counter() - self._started
        self._report(seconds)
        line = sys.stdin.readline()
        if not line:
            raise Finished
        self._left = self._steps = int(line)
        self.data_seconds = 0.0
        self.wait()
        self._started = time.perf_counter()

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def serve(self, measure: Callable[[], dict[str, Any]]) -> None:
        """Instead of timing a loop, answer each request with the result of `measure`."""
        self._answer(self._about)
        while sys.stdin.readline():
            self._answer(measure())

    def _report(self, seconds: float) -> None:
        if self.is_warming_up:
            self._answer({**self._about, **self.facts, "warmup_seconds": seconds})
            return
        self._answer(
            {
                "seconds": seconds / self._steps,
                "data_share": self.data_seconds / seconds,
                "peak_bytes": self._peak(),
                "reserved_bytes": torch.cuda.max_memory_reserved() if self.device.type == "cuda" else None,
            }
        )

    def _answer(self, answer: dict[str, Any]) -> None:
        self._out.write(json.dumps(answer) + "\n")
        self._out.flush()

    def _peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _host_memory("VmHWM") - self._before


def _host_memory(name: str) -> int:
    """Resident memory (`VmRSS`) of this process, or its peak (`VmHWM`), in bytes."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(row.split()[1]) * 1024 for row in status if row.startswith(name))
