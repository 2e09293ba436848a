"""What a schedule is made of: what one rank of a pipeline does with one micro batch."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class ActionKind(enum.Enum):
    """What is done with a micro batch in one model chunk."""

    FORWARD = "F"
    BACKWARD = "B"
    """Gradients of input and weights."""
    BACKWARD_INPUT = "I"
    """Gradient of the input alone; a BACKWARD_WEIGHT follows some time later."""
    BACKWARD_WEIGHT = "W"
    SEND_ACTIVATION = "send activation "
    """Of the chunk's output, to the next stage."""
    RECV_ACTIVATION = "receive activation "
    """Post the receive of the chunk's input; whoever uses the tensor waits for it."""
    SEND_GRADIENT = "send gradient "
    """Of the chunk's input, to the stage before."""
    RECV_GRADIENT = "receive gradient "
    """Post the receive of the gradient of the chunk's output."""


COMPUTE = frozenset({ActionKind.FORWARD, ActionKind.BACKWARD, ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT})
"""Kinds that compute; the others move tensors between ranks."""

RECEIVES = frozenset({ActionKind.RECV_ACTIVATION, ActionKind.RECV_GRADIENT})
"""Kinds that post a receive."""


@dataclass(frozen=True)
class Action:
    """One thing that a rank does.

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
