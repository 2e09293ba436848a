"""The result of a simulation: when each rank of a pipeline computes, its bubbles and its live activations."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from internlm.core.scheduler.actions import Action, ActionKind
from internlm.core.scheduler.schedules import PipelineSchedule


class Event(NamedTuple):
    """A compute action with its start and end times."""

    start: float
    end: float
    action: Action


@dataclass(frozen=True)
class Timeline:
    """A step in virtual time, which starts at 0.

    Attributes:
        schedule: the simulated schedule.
        events: by rank, in chronological order.
    """

    schedule: PipelineSchedule
    events: tuple[tuple[Event, ...], ...]

    @cached_property
    def end(self) -> float:
        """Time at which the last rank finishes."""
        return max(row[-1].end for row in self.events)

    def busy(self, rank: int) -> float:
        """Time during which a rank computes."""
        return sum(event.end - event.start for event in self.events[rank])

    def idle(self, rank: int) -> float:
        """Time during which a rank does not compute."""
        return self.end - self.busy(rank)

    def idle_between(self, rank: int) -> float:
        """Time without computation between the first and the last action of a rank.

        The rest of its idle time is at the ends of the step, where it is a bubble only if steps do not overlap.
        """
        row = self.events[rank]
        return row[-1].end - row[0].start - self.busy(rank)

    def bubble(self, rank: int | None = None) -> float:
        """Fraction of the step during which a rank is idle; None: the mean over all ranks."""
        ranks = range(len(self.events)) if rank is None else (rank,)
        return sum(self.idle(rank) for rank in ranks) / (len(ranks) * self.end)

    def peak_live(self, rank: int) -> int:
        """Peak number of live chunk activations on a rank; each lives from its forward to its last backward action.

        Divided by the number of chunks, this is a number of micro-batches through all layers of the rank.
        """
        live = peak = 0
        for _, _, action in self.events[rank]:
            if action.kind is ActionKind.FORWARD:
                live += 1
                peak = max(peak, live)
            elif action.kind is not ActionKind.BACKWARD_INPUT:
                live -= 1
        return peak
