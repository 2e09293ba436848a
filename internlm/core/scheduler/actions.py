"""What a schedule is made of: an ordered list of actions for one pipeline stage."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class ActionKind(enum.Enum):
    """What is done with a micro batch."""

    FORWARD = "F"
    BACKWARD = "B"


@dataclass(frozen=True)
class Action:
    """One thing a stage does.

    Attributes:
        kind: what is done.
        micro_batch: its number within the step.
        chunk: which of this rank's model chunks does it.
    """

    kind: ActionKind
    micro_batch: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.kind.value}{self.micro_batch}" + (f"c{self.chunk}" if self.chunk else "")
