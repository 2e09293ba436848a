"""Ctrl-C, SIGTERM and a batch system's warning to the running command: it saves, says how to go on, and ends with exit
code 0. SIGUSR2 and the stop file: it saves, and goes on or ends."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.checkpoints import complete_steps
from helpers.commands import last_log_line, metrics_of, start_ranks, start_training, write_config
from helpers.processes import Forked, wait_for_all
from helpers.runs import steps_in

import internlm.commands.train as train
from internlm.core.engine import Engine
from internlm.core.trainer import Trainer

# Enough steps that the run never ends by itself.
ENDLESS = ("--set", "data.total_steps=1000000", "--set", "ckpt.checkpoint_every=1000000")


@pytest.fixture
def started() -> Iterator[list[Forked]]:
    """Processes to kill when the test is over."""
    processes: list[Forked] = []
    yield processes
    for process in processes:
        process.kill()


def steps_of(run_dir: Path) -> list[int]:
    return [line["step"] for line in metrics_of(run_dir)]


@pytest.mark.parametrize(
    ("number", "in_background"), [(signal.SIGINT, False), (signal.SIGTERM, True), (signal.SIGUSR1, False)]
)
def test_a_signal_to_the_whole_group_saves_and_the_same_command_goes_on(
    tmp_path: Path, started: list[Forked], number: signal.Signals, in_background: bool
) -> None:
    """As a terminal's Ctrl-C or a batch system sends it: to the loader's worker processes and the one that writes."""
    config, run_dir = write_config(tmp_path), tmp_path / "run"
    arguments = ["--config", config, "--run-dir", run_dir, *ENDLESS, "--set", "data.num_worker=2"]
    arguments += ["--set", f"ckpt.async_save={in_background}"]
    command = start_training(arguments, tmp_path / "first.txt", own_group=True)
    started.append(command)
    command.wait_until(lambda: len(steps_of(run_dir)) >= 3)
    command.send(number, group=True)
    assert command.wait(30) == 0, command.output
    (stopped_at,) = steps_in(tmp_path / "checkpoints")
    last = command.output.splitlines()[-1]
    assert f"stopped at step {stopped_at}: received {number.name}; run the same command to resume" in last
    assert "Traceback" not in command.output
    assert steps_of(run_dir) == list(range(1, stopped_at + 1))

    again = start_training([*arguments, "--set", f"data.total_steps={stopped_at + 2}"], tmp_path / "second.txt")
    started.append(again)
    assert again.wait() == 0, again.output
    assert f"resuming at step {stopped_at} of {stopped_at + 2}" in again.output
    assert steps_of(run_dir) == list(range(1, stopped_at + 3))


@pytest.mark.parametrize("who", [(0, 1), (1,)], ids=["all-ranks", "one-rank"])
def test_a_signal_to_ranks_stops_all_at_the_same_step(
    tmp_path: Path, started: list[Forked], who: tuple[int, ...]
) -> None:
    config, run_dir = write_config(tmp_path), tmp_path / "run"
    ranks = start_ranks(["--config", config, "--run-dir", run_dir, *ENDLESS], tmp_path)
    started += ranks
    ranks[0].wait_until(lambda: len(steps_of(run_dir)) >= 3)
    for rank in who:
        ranks[rank].send(signal.SIGTERM)
    assert wait_for_all(ranks, 30) == [0, 0], ranks[0].output + ranks[1].output
    (stopped_at,) = steps_in(tmp_path / "checkpoints")
    assert steps_of(run_dir)[-1] == stopped_at
    reason = "received SIGTERM" if 0 in who else "requested on another rank"
    assert f"stopped at step {stopped_at}: {reason}; run the same command" in ranks[0].output


@pytest.mark.parametrize("who", [0, 1])
def test_a_request_to_save_is_met_by_all_ranks_and_the_run_goes_on(
    tmp_path: Path, started: list[Forked], who: int
) -> None:
    config, run_dir = write_config(tmp_path), tmp_path / "run"
    ranks = start_ranks(["--config", config, "--run-dir", run_dir, *ENDLESS], tmp_path)
    started += ranks
    for number in (1, 2):
        ranks[0].wait_until(lambda: len(steps_of(run_dir)) >= 3)
        ranks[who].send(signal.SIGUSR2)
        ranks[0].wait_until(lambda number=number: len(complete_steps(tmp_path / "checkpoints")) == number)  # type: ignore[misc]
    saved_at = complete_steps(tmp_path / "checkpoints")[-1]
    reason = "received SIGUSR2" if who == 0 else "requested on another rank"
    assert f"step {saved_at}: saving a checkpoint: {reason}" in ranks[0].output
    ranks[0].wait_until(lambda: steps_of(run_dir)[-1] > saved_at + 2)
    for rank in ranks:
        rank.send(signal.SIGTERM)
    assert wait_for_all(ranks, 30) == [0, 0], ranks[0].output + ranks[1].output


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_warning_before_the_loop_does_not_end_the_run(
    tmp_path: Path, started: list[Forked], number: signal.Signals
) -> None:
    def warn() -> None:
        build_trainer = train.build_trainer

        def warned(*args: object, **kwargs: object) -> Trainer:
            signal.raise_signal(number)
            return build_trainer(*args, **kwargs)  # type: ignore[arg-type]

        train.build_trainer = warned  # type: ignore[assignment]

    command = start_training(
        ["--config", write_config(tmp_path), "--run-dir", tmp_path / "run"], tmp_path / "out.txt", before=warn
    )
    started.append(command)
    assert command.wait() == 0, command.output
    assert "done: 10 steps" in command.output


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_stop_file_saves_and_stops_at_its_step(tmp_path: Path, started: list[Forked], world_size: int) -> None:
    stop = tmp_path / "stop"
    config, run_dir = write_config(tmp_path, f"ckpt['stop_file_path'] = {str(stop)!r}"), tmp_path / "run"
    stop.write_text("1")  # an older run's

    def slower(rank: int) -> None:
        train_step = Engine.train_step

        def slow(self: Engine, *args: object) -> object:
            time.sleep(0.05)
            return train_step(self, *args)  # type: ignore[arg-type]

        Engine.train_step = slow  # type: ignore[assignment,method-assign]

    arguments = ["--config", config, "--run-dir", run_dir, *ENDLESS]
    ranks = start_ranks(arguments, tmp_path, world_size, slower)
    started += ranks
    ranks[0].wait_until(lambda: len(steps_of(run_dir)) >= 2)
    assert stop.read_text() == "0\n"
    save_at = len(steps_of(run_dir)) + 10
    stop.write_text(str(-save_at))
    ranks[0].wait_until(lambda: complete_steps(tmp_path / "checkpoints") == [save_at])
    stop_at = len(steps_of(run_dir)) + 10
    stop.write_text(f"{stop_at}\n")
    assert wait_for_all(ranks, 30) == [0] * world_size, ranks[0].output
    assert complete_steps(tmp_path / "checkpoints") == [save_at, stop_at]
    assert steps_of(run_dir)[-1] == stop_at
    assert f"stopped at step {stop_at}: requested for step {stop_at}; run the same command" in ranks[0].output

    again = start_ranks([*arguments, "--set", f"data.total_steps={stop_at + 2}"], tmp_path, world_size)
    started += again
    assert wait_for_all(again, 30) == [0] * world_size, again[0].output
    assert steps_of(run_dir)[-1] == stop_at + 2


def test_a_stop_file_with_a_step_that_has_passed_stops_at_once(tmp_path: Path, started: list[Forked]) -> None:
    stop = tmp_path / "stop"
    config, run_dir = write_config(tmp_path, f"ckpt['stop_file_path'] = {str(stop)!r}"), tmp_path / "run"
    command = start_training(["--config", config, "--run-dir", run_dir, *ENDLESS], tmp_path / "out.txt")
    started.append(command)
    command.wait_until(lambda: len(steps_of(run_dir)) >= 4)
    stop.write_text("2")
    assert command.wait(30) == 0, command.output
    (stopped_at,) = complete_steps(tmp_path / "checkpoints")
    assert (
        f"stopped at step {stopped_at}: requested for step 2, which had passed; run the same command" in command.output
    )


def test_a_second_ctrl_c_interrupts_at_once(tmp_path: Path, started: list[Forked]) -> None:
    """When the step hangs, nobody waits for its end."""
    reached = tmp_path / "reached"

    def hang() -> None:
        def train_step(self: Engine, *args: object) -> None:
            reached.touch()
            time.sleep(1000)

        Engine.train_step = train_step  # type: ignore[assignment,method-assign]

    config, run_dir = write_config(tmp_path), tmp_path / "run"
    command = start_training(["--config", config, "--run-dir", run_dir], tmp_path / "out.txt", before=hang)
    started.append(command)
    command.wait_until(reached.exists)
    command.send(signal.SIGINT)
    time.sleep(0.3)  # a person's fingers; also, the first one must have been taken in
    assert command.process.exitcode is None
    command.send(signal.SIGINT)
    assert command.wait(10) == 130, command.output
    assert "Traceback" not in command.output
    assert command.output.splitlines()[-1].endswith("rank 0 failed in phase 'training step, step 1': KeyboardInterrupt")
    assert steps_in(tmp_path / "checkpoints") == []


def test_a_sigterm_before_the_loop_is_told_to_the_log(tmp_path: Path, started: list[Forked]) -> None:
    """There is nothing to save yet; but a launcher that ends the ranks of a failed job must not leave them mute."""
    reached = tmp_path / "reached"

    def hang() -> None:
        def build_trainer(*args: object, **kwargs: object) -> None:
            reached.touch()
            time.sleep(1000)

        train.build_trainer = build_trainer  # type: ignore[assignment]

    command = start_training(
        ["--config", write_config(tmp_path), "--run-dir", tmp_path / "run"], tmp_path / "out.txt", before=hang
    )
    started.append(command)
    command.wait_until(reached.exists)
    command.send(signal.SIGTERM)
    assert command.wait(10) == 143, command.output
    assert last_log_line(tmp_path / "run", 0).endswith("failed in phase 'start': Terminated: received SIGTERM")
    assert "Traceback" not in command.output


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("ckpt = dict(enable_save_ckpt=False)", "nothing was saved, as ckpt.enable_save_ckpt is False"),
        ("ckpt['auto_resume'] = False", "the checkpoint was saved; to resume from it, set ckpt.auto_resume = True"),
    ],
)
def test_the_message_claims_no_more_than_is_true(
    tmp_path: Path, started: list[Forked], more: str, message: str
) -> None:
    config = write_config(tmp_path, more)
    command = start_training(
        ["--config", config, "--run-dir", tmp_path / "run"], tmp_path / "out.txt", before=stop_at(4)
    )
    started.append(command)
    assert command.wait() == 0
    assert command.output.splitlines()[-1].endswith(f"stopped at step 4: received SIGTERM; {message}")


def test_a_signal_in_the_last_step_changes_nothing(tmp_path: Path, started: list[Forked]) -> None:
    config = write_config(tmp_path)
    command = start_training(
        ["--config", config, "--run-dir", tmp_path / "run"], tmp_path / "out.txt", before=stop_at(10)
    )
    started.append(command)
    assert command.wait() == 0
    assert command.output.splitlines()[-1].endswith("done: 10 steps, 640 tokens")
    assert "stopp" not in command.output


def stop_at(step: int) -> Callable[[], None]:
    """A trap that sends this process a SIGTERM in the middle of a step."""

    def install() -> None:
        original = Trainer._train_step

        def train_step(self: Trainer, *args: object) -> object:
            if self.state.step + 1 == step:
                signal.raise_signal(signal.SIGTERM)
            return original(self, *args)  # type: ignore[arg-type]

        Trainer._train_step = train_step  # type: ignore[assignment,method-assign]

    return install
