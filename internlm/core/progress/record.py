"""The record of what this rank is doing, written by the loop.

Trainer, engine and executor mark each phase as they enter it. A mark is an assignment on the host: it sends nothing and
does not wait for the device. `stall_watch` reads the record, and error messages quote it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager


class Progress:
    """The progress of one rank.

    One thread writes. Others may read any attribute at any time; two attributes may belong to different marks.

    Attributes:
        step: number of the current step, from 1; 0 before the loop.
        activity: an announced activity that may take long (building, saving, evaluating); empty in a training step.
        phase: description of the current phase of the step or activity.
        began: `time.monotonic()` at the start of the activity, of the step, or of its rest after an activity.
        changed: `time.monotonic()` at the last mark.
        num_collectives: returns the number of collectives that this rank has started in each process group, by group
            name; empty until the groups exist. May be called from any thread.
    """

    def __init__(self) -> None:
        self.step = 0
        self.activity = "start"
        self.phase = ""
        self.began = self.changed = time.monotonic()
        self.num_collectives: Callable[[], Mapping[str, int]] = dict

    def begin_step(self, step: int) -> None:
        """Record the start of a step."""
        self.step, self.activity, self.phase = step, "", "start of the step"
        self.began = self.changed = time.monotonic()

    def mark(self, phase: str) -> None:
        """Record the start of a phase, which ends the previous one."""
        self.phase = phase
        self.changed = time.monotonic()

    @contextmanager
    def announce(self, activity: str) -> Iterator[None]:
        """A context for an activity that may take long; its time does not count as time of the step.

        After an exception, the activity stays recorded until the next step or activity, for the error message.
        """
        self.activity, self.phase = activity, ""
        self.began = self.changed = time.monotonic()
        yield
        self.activity, self.phase = "", f"after {activity}"
        self.began = self.changed = time.monotonic()

    @property
    def what(self) -> str:
        """Activity and phase, without the step number."""
        return ", ".join(part for part in (self.activity, self.phase) if part)

    def __str__(self) -> str:
        return f"{self.what}, step {self.step}" if self.step else self.what
