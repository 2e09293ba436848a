"""What this rank is doing: a record that the loop writes and others read.

The trainer, the engine and the executor mark each phase as they enter it. A mark is an assignment on the host; nothing
is sent and nothing waits for the device. `stall_watch` reads the record, and the message of a failure quotes it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager


class Progress:
    """The progress of one rank.

    One thread writes. Others may read each attribute at any time; two of them may be of different marks.

    Attributes:
        step: the step at work, 1 for the first; 0 before the loop.
        activity: an announced activity that may take long (building, saving, evaluating); empty in a training step.
        phase: what is done within it, for people.
        began: `time.monotonic()` when the step, or what is left of it after an activity, or the activity began.
        changed: `time.monotonic()` at the last mark.
        num_collectives: how many collectives this rank has begun in each process group, by the group's name. To be
            called by readers, from any thread; empty until the groups exist.
    """

    def __init__(self) -> None:
        self.step = 0
        self.activity = "start"
        self.phase = ""
        self.began = self.changed = time.monotonic()
        self.num_collectives: Callable[[], Mapping[str, int]] = dict

    def begin_step(self, step: int) -> None:
        """A step begins."""
        self.step, self.activity, self.phase = step, "", "start of the step"
        self.began = self.changed = time.monotonic()

    def mark(self, phase: str) -> None:
        """A phase begins, and ends the one before."""
        self.phase = phase
        self.changed = time.monotonic()

    @contextmanager
    def announce(self, activity: str) -> Iterator[None]:
        """Everything inside belongs to an activity that may take long, and does not count in the time of the step.

        After an exception the activity stays, for the message, until the next step or activity.
        """
        self.activity, self.phase = activity, ""
        self.began = self.changed = time.monotonic()
        yield
        self.activity, self.phase = "", f"after {activity}"
        self.began = self.changed = time.monotonic()

    @property
    def what(self) -> str:
        """Activity and phase, without the step."""
        return ", ".join(part for part in (self.activity, self.phase) if part)

    def __str__(self) -> str:
        return f"{self.what}, step {self.step}" if self.step else self.what
