"""Schedules are lists of actions, and the executor does what they say."""

from __future__ import annotations

import pytest
import torch

from internlm.core.scheduler.actions import ActionKind
from internlm.core.scheduler.executor import execute
from internlm.core.scheduler.schedules import non_pipeline


def test_non_pipeline_keeps_one_micro_batch_alive() -> None:
    actions = non_pipeline(1, 3, 1, 0)
    assert [str(action) for action in actions] == ["F0", "B0", "F1", "B1", "F2", "B2"]
    alive = peak = 0
    for action in actions:
        alive += 1 if action.kind is ActionKind.FORWARD else -1
        peak = max(peak, alive)
    assert (alive, peak) == (0, 1)
    with pytest.raises(ValueError, match="1 stage"):
        non_pipeline(2, 3, 1, 0)


def test_the_executor_announces_the_last_backward_only() -> None:
    log: list[str] = []
    weight = torch.nn.Parameter(torch.ones(()))
    weight.register_post_accumulate_grad_hook(lambda _: log.append("gradient"))

    def forward(number: int) -> torch.Tensor:
        log.append(f"forward {number}")
        return weight * number

    execute(non_pipeline(1, 2, 1, 0), forward, lambda: log.append("final"))
    assert log == ["forward 0", "gradient", "forward 1", "final", "gradient"]
    assert float(weight.grad) == 1.0  # type: ignore[arg-type]
