"""A rank of two stands still: the log says which and where, stacks are written, the job ends. A slow one goes on."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import last_log_line, metrics_of, start_ranks, start_training, write_config
from helpers.processes import wait_for_all

import internlm.core.failure as failure
from internlm.core.engine import Engine

SLOW, STUCK = 3.0, 7.0
LIMIT_SECONDS = 40


def trap(victim: int, step: int, action: Any) -> Any:
    """`action()` in the forward pass of a step on one rank."""

    def install(rank: int) -> None:
        failure.POLL_SECONDS, failure.GRACE_SECONDS = 0.2, 0.5
        original, steps = Engine.train_step, []

        def train_step(self: Engine, *args: Any) -> Any:
            steps.append(1)
            if len(steps) == step and rank == victim:
                forward = self._forward

                def trapped(*args: Any) -> Any:
                    self._forward = forward  # type: ignore[method-assign]
                    action()
                    return forward(*args)

                self._forward = trapped  # type: ignore[method-assign]
            return original(self, *args)

        Engine.train_step = train_step  # type: ignore[method-assign]

    return install


def stop() -> None:
    time.sleep(SLOW / 4)  # two reports later
    os.kill(os.getpid(), signal.SIGSTOP)


def hold() -> None:
    # With the interpreter's lock, unlike time.sleep: none of this process's Python threads runs.
    ctypes.PyDLL(None).sleep(1000)


def wait() -> None:
    time.sleep(1000)


def dawdle() -> None:
    time.sleep(1.5 * SLOW)


SCENARIOS = {
    "stopped-0": (0, stop),
    "stopped-1": (1, stop),
    "held-1": (1, hold),
    "waits-1": (1, wait),
    "slow-1": (1, dawdle, 30.0),
}


class Run:
    """Two ranks, one of which meets a trap in step 3."""

    def __init__(self, folder: Path, victim: int, action: Callable[[], None], stuck: float = STUCK) -> None:
        self.folder = folder / "run"
        arguments = ["--config", write_config(folder), "--run-dir", self.folder, "--set", "data.total_steps=5"]
        arguments += ["--set", f"monitor.slow_step_seconds={SLOW}"]
        arguments += ["--set", f"monitor.collective_timeout_seconds={stuck}"]
        self.ranks = start_ranks(arguments, folder, before=trap(victim, 3, action))

    def log(self, rank: int) -> str:
        return (self.folder / "logs" / f"rank{rank}.log").read_text()

    def last_line(self, rank: int) -> str:
        return last_log_line(self.folder, rank)

    def stacks(self, rank: int) -> str:
        return (self.folder / "logs" / f"rank{rank}.stacks").read_text()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Run]]:
    """All at once: nearly all of their time is waiting."""
    started = {name: Run(tmp_path_factory.mktemp(name), *scenario) for name, scenario in SCENARIOS.items()}
    yield started
    for run in started.values():
        for rank in run.ranks:
            rank.kill()


IN_FORWARD = "in forward of micro-batch 0, step 3"


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank_is_named_with_its_phase_and_ends_the_job(runs: dict[str, Run], victim: int) -> None:
    """Rank 0 holds the job's store, too: nobody can ask it anything any more."""
    run, other = runs[f"stopped-{victim}"], 1 - victim
    assert run.ranks[other].wait(LIMIT_SECONDS) == 1
    told = re.search(r"step 3 has taken \d s; (.*)", run.log(other))
    assert told is not None, run.log(other)
    pid = run.ranks[victim].pid
    stopped = f"rank {victim}, last seen {IN_FORWARD}: its process {pid} is stopped, by a signal or a debugger"
    # Of rank 0, its process is seen first, or that the store is silent.
    reasons = [stopped] if victim == 1 else [stopped, "rank 0, which holds the job's store and does not respond"]
    assert told[1] in [f"waiting for {reason}" for reason in reasons]
    assert f"rank {other} made no progress for" in run.last_line(other)
    assert any(f"waiting for {reason}" in run.last_line(other) for reason in reasons)
    assert "step 3" in run.stacks(other) and "train_step" in run.stacks(other)
    # The stopped rank, let go, ends as well.
    run.ranks[victim].send(signal.SIGCONT)
    assert run.ranks[victim].wait(LIMIT_SECONDS) == 1


def test_a_rank_that_holds_the_interpreter_is_named_and_writes_its_stacks(runs: dict[str, Run]) -> None:
    run = runs["held-1"]
    assert run.ranks[0].wait(LIMIT_SECONDS) == 1
    pid = run.ranks[1].pid
    assert f"its process {pid} is alive, but all its Python threads are blocked" in run.last_line(0)
    assert "hold" in run.stacks(1) and "train_step" in run.stacks(1)


def test_a_rank_that_waits_for_ever_is_told_from_those_that_wait_for_it(runs: dict[str, Run]) -> None:
    run = runs["waits-1"]
    assert wait_for_all(run.ranks, LIMIT_SECONDS) == [1, 1]
    assert re.search(rf"step 3 has taken \d s; waiting for rank 1, {IN_FORWARD} for \d s", run.log(0))
    for rank in (0, 1):
        assert f"waiting for rank 1, {IN_FORWARD} for" in run.last_line(rank)
        assert "train_step" in run.stacks(rank)


def test_a_slow_step_is_told_and_the_run_goes_on(runs: dict[str, Run]) -> None:
    run = runs["slow-1"]
    assert wait_for_all(run.ranks, LIMIT_SECONDS) == [0, 0]
    assert re.search(rf"step 3 has taken \d s; waiting for rank 1, {IN_FORWARD}", run.log(0))
    assert "it ended after" in run.log(0)
    assert len(metrics_of(run.folder)) == 5
    # Where a busy machine gives a rank no time, the interpreter's timer may have written stacks; the watch never does.
    written = [file.read_text() for file in (run.folder / "logs").glob("*.stacks")]
    assert all(text and not re.search(r"rank \d, for \d+ s in", text) for text in written)


def test_one_process_tells_a_slow_step_and_is_never_ended(tmp_path: Path) -> None:
    def before() -> None:
        trap(0, 2, lambda: time.sleep(1.0))(0)
        os.environ["INTERNLM_ENABLE_TIMEOUT"] = "1"

    arguments = ["--config", write_config(tmp_path), "--run-dir", tmp_path / "run", "--set", "data.total_steps=3"]
    arguments += ["--set", "monitor.slow_step_seconds=0.3", "--set", "monitor.collective_timeout_seconds=0.6"]
    command = start_training(arguments, tmp_path / "out.txt", before=before)
    assert command.wait(LIMIT_SECONDS) == 0, command.output
    assert f"step 2 has taken 0 s; {IN_FORWARD.replace('3', '2')} for 0 s" in command.output
    assert "INTERNLM_ENABLE_TIMEOUT is ignored: monitor.collective_timeout_seconds = 0.6 is set" in command.output
    assert "trapped" in (tmp_path / "run" / "logs" / "rank0.stacks").read_text()
