"""Runs a list of actions. Knows no schedule by name, no model and no optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from internlm.core.scheduler.actions import Action, ActionKind


def execute(
    actions: Sequence[Action], forward: Callable[[int], Tensor], before_final_backward: Callable[[], None]
) -> None:
    """Carry out the actions of one stage in order.

    Args:
        actions: from a schedule.
        forward: micro-batch number -> the scalar whose backward is this micro batch's.
        before_final_backward: called once, before the last backward pass of the step.
    """
    alive: dict[tuple[int, int], Tensor] = {}
    backwards = [number for number, action in enumerate(actions) if action.kind is ActionKind.BACKWARD]
    for number, action in enumerate(actions):
        key = (action.chunk, action.micro_batch)
        if action.kind is ActionKind.FORWARD:
            alive[key] = forward(action.micro_batch)
        else:
            if number == backwards[-1]:
                before_final_backward()
            alive.pop(key).backward()
