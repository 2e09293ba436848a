"""The elements of a schedule: what one rank of a pipeline does with one micro-batch."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class ActionKind(enum.Enum):
    """What is done with a micro-batch in one model chunk."""

    FORWARD = "F"
    BACKWARD = "B"
    """Gradients of input and weights."""
    BACKWARD_INPUT = "I"
    """Gradient of the input only; a BACKWARD_WEIGHT follows later."""
    BACKWARD_WEIGHT = "W"
    SEND_ACTIVATION = "send activation "
    """Send the chunk's output to the next stage."""
    RECV_ACTIVATION = "receive activation "
    """Post the receive of the chunk's input; the action that uses the tensor waits for it."""
    SEND_GRADIENT = "send gradient "
    """Send the gradient of the chunk's input to the previous stage."""
    RECV_GRADIENT = "receive gradient "
    """Post the receive of the gradient of the chunk's output."""


COMPUTE = frozenset({ActionKind.FORWARD, ActionKind.BACKWARD, ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT})
"""Kinds that compute; the others transfer tensors between ranks."""

RECEIVES = frozenset({ActionKind.RECV_ACTIVATION, ActionKind.RECV_GRADIENT})
"""Kinds that post a receive."""


@dataclass(frozen=True)
class Action:
    """One entry of a schedule.

    Attributes:
        kind: what is done.
        micro_batch: its number within the step.
        chunk: number of the model chunk on this rank.
    """

    kind: ActionKind
    micro_batch: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.kind.value}{self.micro_batch}" + (f"c{self.chunk}" if self.chunk else "")
