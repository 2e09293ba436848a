"""Ctrl-C and SIGTERM to the running command: it saves, says how to go on, and ends with exit code 0."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.commands import Command, write_config

from internlm.checkpoint.folder import complete_steps

# Enough steps that the run never ends by itself.
ENDLESS = ("--set", "data.total_steps=1000000", "--set", "ckpt.checkpoint_every=1000000")


@pytest.fixture
def started() -> Iterator[list[Command]]:
    """Commands to kill when the test is over."""
    commands: list[Command] = []
    yield commands
    for command in commands:
        command.kill()


def steps_of(run_dir: Path) -> list[int]:
    """The steps on file."""
    path = run_dir / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_saves_and_the_same_command_goes_on(
    tmp_path: Path, started: list[Command], number: signal.Signals
) -> None:
    """As a terminal's Ctrl-C or a batch system sends it: to the loader's worker processes, too."""
    config, run_dir = write_config(tmp_path), tmp_path / "run"
    arguments = ["--config", config, "--run-dir", run_dir, *ENDLESS, "--set", "data.num_worker=2"]
    command = Command(arguments, tmp_path / "first.txt", own_group=True)
    started.append(command)
    command.wait_until(lambda: len(steps_of(run_dir)) >= 3)
    command.send(number, group=True)
    assert command.wait(30) == 0, command.output
    (stopped_at,) = complete_steps(tmp_path / "checkpoints")
    last = command.output.splitlines()[-1]
    assert f"stopped at step {stopped_at}: received {number.name}; the same command goes on from here" in last
    assert "Traceback" not in command.output
    assert steps_of(run_dir) == list(range(1, stopped_at + 1))

    again = Command([*arguments, "--set", f"data.total_steps={stopped_at + 2}"], tmp_path / "second.txt")
    started.append(again)
    assert again.wait() == 0, again.output
    assert f"resuming at step {stopped_at} of {stopped_at + 2}" in again.output
    assert steps_of(run_dir) == list(range(1, stopped_at + 3))
