"""Schedules: pure functions from the shape of a pipeline to the list of actions of one stage."""

from __future__ import annotations

from collections.abc import Callable

from internlm.core.scheduler.actions import Action, ActionKind

Schedule = Callable[[int, int, int, int], list[Action]]
"""(number of stages, number of micro batches, chunks a stage, stage) -> the stage's actions in order."""


def non_pipeline(num_stages: int, num_micro_batches: int, num_chunks: int, stage: int) -> list[Action]:
    """One stage: forward and backward of one micro batch after the other, so one micro batch is alive at a time."""
    if (num_stages, num_chunks, stage) != (1, 1, 0):
        raise ValueError(f"the non-pipeline schedule is for 1 stage and 1 chunk, not {num_stages} and {num_chunks}")
    actions = []
    for micro_batch in range(num_micro_batches):
        actions += [Action(ActionKind.FORWARD, micro_batch), Action(ActionKind.BACKWARD, micro_batch)]
    return actions
