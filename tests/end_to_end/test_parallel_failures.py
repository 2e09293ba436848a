"""One rank of a pipeline with tensor groups fails in each phase of a step: all others end within 30 s and say why."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import last_log_line, start_ranks, write_config
from helpers.processes import wait_for_all

import internlm.core.failure as failure
from internlm.core.communication.p2p import PipelineChannels
from internlm.core.engine import Engine
from internlm.solver.optimizer import hybrid_zero
from internlm.solver.optimizer.flat_bucket import FlatBucket

LIMIT_SECONDS = 30
WORLD_SIZE = 4

LAYOUT = """
model["vocab_size"] = 64
model["num_layers"] = 4
parallel = dict(
    tensor=dict(size=2, mode="{mode}"), weight=dict(size={weight}), pipeline=dict(size=2, mode="{schedule}")
)
data["micro_num"] = 4
"""
LAYOUTS = {"msp-1F1B": ("msp", 1, "1F1B"), "isp-ZBV": ("isp", 2, "ZBV")}

# Where a step can fail: what is called there, and how the log names the phase.
PHASES: dict[str, tuple[Any, str, str]] = {
    "forward": (Engine, "_forward", "forward of micro-batch"),
    "send": (PipelineChannels, "send", "send "),
    "reduce": (FlatBucket, "start_reduction", "optimizer step"),
    "update": (hybrid_zero, "global_grad_norm", "optimizer step"),
    "gather": (FlatBucket, "start_gathering", "optimizer step"),
}


def trap(phase: str, victim: int, action: Callable[..., Any]) -> Callable[[int], None]:
    """On one rank, `action` in place of a call in the middle of the run."""
    owner, name, _ = PHASES[phase]

    def install(rank: int) -> None:
        failure.POLL_SECONDS, failure.GRACE_SECONDS = 0.2, 0.5
        if rank != victim:
            return
        original, calls = getattr(owner, name), []

        def call(self: Any, *args: Any) -> Any:
            calls.append(1)
            return action() if len(calls) == 10 else original(self, *args)

        setattr(owner, name, call)

    return install


def fail() -> None:
    raise RuntimeError("the trap has sprung")


def shoot() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, layout: str, install: Callable[[int], None]) -> list[int]:
    """The exit codes of a run."""
    mode, weight, schedule = LAYOUTS[layout]
    more = LAYOUT.format(mode=mode, weight=weight, schedule=schedule)
    arguments = ["--config", write_config(folder, more), "--run-dir", folder / "run"]
    return wait_for_all(start_ranks(arguments, folder, WORLD_SIZE, before=install), LIMIT_SECONDS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_trains_when_nothing_fails(layout: str, tmp_path: Path) -> None:
    assert train(tmp_path, layout, lambda rank: None) == [0] * WORLD_SIZE


@pytest.mark.parametrize("phase", PHASES)
def test_an_exception_on_one_rank_ends_all_with_its_cause(phase: str, tmp_path: Path) -> None:
    victim = 1
    assert 0 not in train(tmp_path, "isp-ZBV", trap(phase, victim, fail))
    cause = last_log_line(tmp_path / "run", victim)
    assert f"rank {victim} failed in phase '{PHASES[phase][2]}" in cause
    assert cause.endswith("RuntimeError: the trap has sprung")
    for rank in range(WORLD_SIZE):
        if rank != victim:
            last = last_log_line(tmp_path / "run", rank)
            assert "stopped because " + cause.split(": ", 1)[1] in last, last


@pytest.mark.parametrize("phase", PHASES)
def test_a_killed_rank_takes_all_others_with_it(phase: str, tmp_path: Path) -> None:
    victim = 2
    codes = train(tmp_path, "msp-1F1B", trap(phase, victim, shoot))
    assert codes[victim] == -signal.SIGKILL
    assert 0 not in codes
    # Who first sees the closed connection tells all others.
    lines = [last_log_line(tmp_path / "run", rank) for rank in range(WORLD_SIZE) if rank != victim]
    assert all(" failed in phase '" in line for line in lines), lines
