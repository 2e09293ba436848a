"""When each rank of a pipeline does what: the result of a simulation, with its bubbles and its memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from internlm.core.scheduler.actions import Action, ActionKind
from internlm.core.scheduler.schedules import PipelineSchedule


class Event(NamedTuple):
    """A compute action and the time it takes."""

    start: float
    end: float
    action: Action


@dataclass(frozen=True)
class Timeline:
    """A step in virtual time, from 0 on.

    Attributes:
        schedule: what was run.
        events: by rank, in order of time.
    """

    schedule: PipelineSchedule
    events: tuple[tuple[Event, ...], ...]

    @cached_property
    def end(self) -> float:
        """When the last rank is done."""
        return max(row[-1].end for row in self.events)

    def busy(self, rank: int) -> float:
        """Time in which a rank computes."""
        return sum(event.end - event.start for event in self.events[rank])

    def idle(self, rank: int) -> float:
        """Time of the step in which a rank does not compute."""
        return self.end - self.busy(rank)

    def idle_between(self, rank: int) -> float:
        """Time without computation between the first and the last action of a rank.

        The rest of its idle time lies at the ends of the step, where it is a bubble only if the steps do not overlap.
        """
        row = self.events[rank]
        return row[-1].end - row[0].start - self.busy(rank)

    def bubble(self, rank: int | None = None) -> float:
        """The share of the step in which a rank is idle; None: the mean over all ranks."""
        ranks = range(len(self.events)) if rank is None else (rank,)
        return sum(self.idle(rank) for rank in ranks) / (len(ranks) * self.end)

    def peak_live(self, rank: int) -> int:
        """The most chunk activations that a rank holds at a time, each from its forward to its last backward.

        Divided by the number of chunks these are micro batches through all layers of the rank.
        """
        live = peak = 0
        for _, _, action in self.events[rank]:
            if action.kind is ActionKind.FORWARD:
                live += 1
                peak = max(peak, live)
            elif action.kind is not ActionKind.BACKWARD_INPUT:
                live -= 1
        return peak
