"""Saves that fail in the middle of a run: it says so and goes on, older checkpoints stay as they were, and the next
save works as soon as it can. At the end, and before the first step, a folder that cannot be written is an error."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.checkpoints import complete_steps, leftovers, step_of
from helpers.commands import metrics_of, start_ranks, start_training, write_config
from helpers.forked_writer import fork_writers
from helpers.processes import Forked, wait_for_all

from internlm.core.engine import Engine
from internlm.utils.storage.local import LocalSink

DISK_BYTES = 4 * 2**20
SAVING = """
data["total_steps"] = lr_scheduler["total_steps"] = 1_000_000
ckpt.update(save_ckpt_folder={folder!r}, checkpoint_every=2, keep_latest=2, async_save={in_background})
"""
FAILED = r"step \d+: the checkpoint could not be saved"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def started() -> Iterator[list[Forked]]:
    """Processes to kill when the test is over."""
    processes: list[Forked] = []
    yield processes
    for process in processes:
        process.kill()


class Job:
    """A run without end that saves every second step."""

    def __init__(
        self,
        folder: Path,
        save_folder: Path,
        started: list[Forked],
        *,
        num_ranks: int = 1,
        in_background: bool = False,
        before: Callable[[int], None] = lambda rank: None,
    ) -> None:
        self.save_folder = save_folder
        self.run_dir = folder / "run"
        config = write_config(folder, SAVING.format(folder=str(save_folder), in_background=in_background))
        self.ranks = start_ranks(["--config", config, "--run-dir", self.run_dir], folder, num_ranks, slowly(before))
        started += self.ranks

    @property
    def log(self) -> str:
        return self.ranks[0].output

    def wait_for_saves(self, count: int = 2) -> list[int]:
        """Wait for that many checkpoints that were not there; returns all."""
        before = self.log.count(": saved checkpoint")
        self.ranks[0].wait_until(lambda: self.log.count(": saved checkpoint") >= before + count)
        return complete_steps(self.save_folder)

    def wait_for_failures(self, count: int = 3) -> None:
        """Wait for that many failures in a row."""
        self.ranks[0].wait_until(lambda: f"({count} failures in a row)" in self.log)

    def stop(self) -> list[int]:
        """End it by SIGTERM; returns the exit codes."""
        for rank in self.ranks:
            rank.send(signal.SIGTERM)
        return wait_for_all(self.ranks, 60)


def slowly(before: Callable[[int], None]) -> Callable[[int], None]:
    """So that a test can follow."""

    def install(rank: int) -> None:
        train_step = Engine.train_step

        def slow(self: Engine, *args: Any) -> Any:
            time.sleep(0.02)
            return train_step(self, *args)

        Engine.train_step = slow  # type: ignore[method-assign]
        fork_writers()
        before(rank)

    return install


def fill(disk: Path) -> None:
    with (disk / "ballast").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC


def check_told(log: str, newest: Path, cause: str) -> None:
    """The alerts name the step, the cause, the newest good checkpoint, and how many failed in a row."""
    alerts = [line for line in log.splitlines() if " ERROR " in line]
    first = re.search(rf"{FAILED}: (.*); the newest complete one is (\S+); the run continues", alerts[0])
    assert first, alerts[0]
    assert cause in first[1]
    assert first[2] == str(newest)
    assert "(2 failures in a row): " in alerts[1]
    assert "Traceback" not in log


@pytest.mark.parametrize("in_background", [False, True], ids=["sync", "async"])
def test_a_full_disk(tmp_path: Path, disk: Path, started: list[Forked], in_background: bool) -> None:
    job = Job(tmp_path, disk / "checkpoints", started, num_ranks=2, in_background=in_background)
    job.wait_for_saves()
    fill(disk)
    job.wait_for_failures()
    kept = complete_steps(job.save_folder)
    newest = [line for line in job.log.splitlines() if ": saved checkpoint" in line][-1].split()
    assert str(job.save_folder / str(kept[-1])) in newest
    check_told(job.log, job.save_folder / str(kept[-1]), "no space left on device")
    assert {step_of(job.save_folder / str(step)) for step in kept} == set(kept)
    (disk / "ballast").unlink()
    later = job.wait_for_saves()
    assert later[-1] > kept[-1]
    assert job.stop() == [0, 0], job.log
    assert leftovers(job.save_folder) == []
    steps = [line["step"] for line in metrics_of(job.run_dir)]
    assert steps == list(range(1, len(steps) + 1))
    assert complete_steps(job.save_folder)[-1] == steps[-1]


def test_a_disk_that_becomes_read_only(tmp_path: Path, disk: Path, started: list[Forked]) -> None:
    job = Job(tmp_path, disk / "checkpoints", started)
    job.wait_for_saves()
    # While a file is being written, a disk cannot change.
    while subprocess.run(["mount", "-o", "remount,ro", str(disk)], capture_output=True).returncode:
        time.sleep(0.002)
    job.wait_for_failures()
    kept = complete_steps(job.save_folder)
    check_told(job.log, job.save_folder / str(kept[-1]), "read-only file system")
    subprocess.run(["mount", "-o", f"remount,rw,size={DISK_BYTES}", str(disk)], check=True)
    assert job.wait_for_saves()[-1] > kept[-1]
    assert job.stop() == [0], job.log
    assert leftovers(job.save_folder) == []


@pytest.mark.parametrize("in_background", [False, True], ids=["sync", "async"])
def test_a_folder_that_is_replaced_by_a_file(tmp_path: Path, started: list[Forked], in_background: bool) -> None:
    job = Job(tmp_path, tmp_path / "checkpoints", started, in_background=in_background)
    job.wait_for_saves()
    away = tmp_path / "away"
    job.save_folder.rename(away)
    job.save_folder.write_text("in the way")
    job.wait_for_failures()
    kept = complete_steps(away)
    check_told(job.log, job.save_folder / str(kept[-1]), "a part of this path is a file where a folder should be")
    job.save_folder.unlink()
    away.rename(job.save_folder)
    assert job.wait_for_saves()[-1] > kept[-1]
    assert job.stop() == [0], job.log
    assert leftovers(job.save_folder) == []


def no_space_on(victim: int, flag: Path) -> Callable[[int], None]:
    """While `flag` is there, what one rank writes meets a full disk."""

    def install(rank: int) -> None:
        if rank != victim:
            return
        put = LocalSink.put

        def full(self: LocalSink, data: memoryview) -> int:
            if flag.exists():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return put(self, data)

        LocalSink.put = full  # type: ignore[method-assign]

    return install


@pytest.mark.parametrize("victim", [0, 1])
def test_one_rank_that_cannot_write(tmp_path: Path, started: list[Forked], victim: int) -> None:
    flag = tmp_path / "full"
    job = Job(tmp_path, tmp_path / "checkpoints", started, num_ranks=2, before=no_space_on(victim, flag))
    job.wait_for_saves()
    flag.touch()
    job.wait_for_failures()
    kept = complete_steps(job.save_folder)
    check_told(job.log, job.save_folder / str(kept[-1]), f"rank {victim}: cannot write ")
    flag.unlink()
    assert job.wait_for_saves()[-1] > kept[-1]
    assert job.stop() == [0, 0], job.log
    assert leftovers(job.save_folder) == []


def test_a_killed_writing_process_costs_a_save_at_most(tmp_path: Path, started: list[Forked]) -> None:
    """As the kernel does to the larger ones when memory is short."""
    job = Job(tmp_path, tmp_path / "checkpoints", started, in_background=True)
    kept = job.wait_for_saves()
    (writer,) = children_of(job.ranks[0].pid)
    os.kill(writer, signal.SIGKILL)
    assert job.wait_for_saves()[-1] > kept[-1]
    assert children_of(job.ranks[0].pid) != [writer]
    assert job.stop() == [0], job.log
    assert "Traceback" not in job.log


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("in_background", [False, True], ids=["sync", "async"])
def test_a_last_save_that_fails_is_tried_once_more_and_then_an_error(
    tmp_path: Path, started: list[Forked], in_background: bool
) -> None:
    job = Job(tmp_path, tmp_path / "checkpoints", started, num_ranks=2, in_background=in_background)
    kept = job.wait_for_saves()
    away = tmp_path / "away"
    job.save_folder.rename(away)
    job.save_folder.write_text("in the way")
    job.wait_for_failures(2)
    assert job.stop() == [2, 2], job.log
    for rank, process in enumerate(job.ranks):
        last = process.output.splitlines()[-1]
        assert "but the last checkpoint could not be saved" in last, (rank, last)
    assert "the run ends here, so the failed save is retried once" in job.log
    assert "Traceback" not in job.log
    assert complete_steps(away)[-1] >= kept[-1]


def test_a_last_save_that_works_at_the_second_try_is_no_error(tmp_path: Path, started: list[Forked]) -> None:
    """Ten steps with the only save at the end, which fails once."""
    done = tmp_path / "failed"

    def fail_once() -> None:
        put = LocalSink.put

        def full(self: LocalSink, data: memoryview) -> int:
            if self.url.endswith(".distcp") and not done.exists():
                done.touch()
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return put(self, data)

        LocalSink.put = full  # type: ignore[method-assign]

    config = write_config(tmp_path, "ckpt['checkpoint_every'] = 10")
    command = start_training(
        ["--config", config, "--run-dir", tmp_path / "run"], tmp_path / "out.txt", before=fail_once
    )
    started.append(command)
    assert command.wait() == 0, command.output
    assert "step 10: the checkpoint could not be saved: cannot write" in command.output
    assert "step 10: the run ends here, so the failed save is retried once" in command.output
    assert complete_steps(tmp_path / "checkpoints") == [10]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_an_exception_lets_a_save_in_the_background_end(tmp_path: Path, started: list[Forked], num_ranks: int) -> None:
    def break_step_three(rank: int) -> None:
        fork_writers()
        if rank != num_ranks - 1:
            return
        train_step, calls = Engine.train_step, []

        def broken(self: Engine, *args: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:
                raise RuntimeError("broken on purpose")
            return train_step(self, *args)

        Engine.train_step = broken  # type: ignore[method-assign]

    config = write_config(tmp_path, "ckpt.update(checkpoint_every=2, async_save=True)")
    ranks = start_ranks(["--config", config, "--run-dir", tmp_path / "run"], tmp_path, num_ranks, break_step_three)
    started += ranks
    assert wait_for_all(ranks, 60) == [1] * num_ranks
    assert ranks[-1].output.splitlines()[-1].endswith("RuntimeError: broken on purpose")
    deadline = time.monotonic() + 30  # the writing process of a rank may outlive it
    while complete_steps(tmp_path / "checkpoints") != [2]:
        assert time.monotonic() < deadline, ranks[0].output
        time.sleep(0.05)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_save_folder_that_cannot_be_written_is_refused_before_the_first_step(
    tmp_path: Path, started: list[Forked], num_ranks: int
) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    job = Job(tmp_path, tmp_path / "checkpoints", started, num_ranks=num_ranks)
    assert wait_for_all(job.ranks, 60) == [2] * num_ranks, job.log
    assert metrics_of(job.run_dir) == []
    last = job.log.splitlines()[-1]
    assert f"'{job.save_folder}'" in last and "is a file where a folder should be" in last
    assert "Traceback" not in job.log
