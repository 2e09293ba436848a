"""Kills a run at random instants, starts it again each time, and checks that no more is lost than must be.

    python tests/kill_and_resume.py --kills 200
    python tests/kill_and_resume.py --kills 200 --ranks 2 --async --seed 7

A tiny model is trained that saves at every step: a checkpoint at every third, of which two are kept, and a snapshot at
the others. All its processes are killed at once (SIGKILL), while it starts, in a step or during a save; of a run that
saves in the background sometimes only the ranks, so that the processes that write go on beside the next start. Checked
are:

- each start resumes, from a checkpoint that was complete, and from no earlier step than the newest checkpoint of which
  the log had said before the kill that it is saved;
- what killed saves leave behind does not pile up, and no more checkpoints are kept than asked for;
- in the end the numbers of every step, and the weights and optimizer state of the last checkpoint, are bit for bit
  those of a run that nobody killed.

Exits 1 when any of these does not hold.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from helpers.checkpoints import leftovers, step_of
from helpers.commands import metrics_of, start_ranks, start_training, write_config
from helpers.forked_writer import fork_writers
from helpers.processes import Forked, wait_for_all

from internlm.checkpoint.tensor_files import TensorReader
from internlm.utils.storage import storage_path

KEEP = 2
STEPS_PER_KILL = 6
SAVING = f"ckpt.update(checkpoint_every=3, oss_snapshot_freq=1, keep_latest={KEEP}, async_save={{in_background}})"
ONE_SAVE = "ckpt['checkpoint_every'] = data['total_steps']"
LENGTH = "data['total_steps'] = lr_scheduler['total_steps'] = {steps}\n"
MOST_LEFTOVERS = 3
"""In one folder: of a save that writes, replaces or deletes."""


class UnsafeError(AssertionError):
    """Something was lost, or is not as it should be."""


class Run:
    """One run, killed and resumed, in a folder of its own."""

    def __init__(self, folder: Path, total_steps: int, num_ranks: int, *, in_background: bool, saving: str) -> None:
        self.folder = folder
        self.num_ranks = num_ranks
        self.run_dir = folder / "run"
        self.save_folder = folder / "checkpoints"
        self.snapshot_folder = self.save_folder / "snapshot"
        more = LENGTH.format(steps=total_steps) + saving.format(in_background=in_background)
        self.config = write_config(folder, more)
        self.num_attempts = 0

    def start(self) -> Attempt:
        """Start it, or go on."""
        self.num_attempts += 1
        return Attempt(self, self.folder / f"attempt{self.num_attempts}")

    def complete(self) -> dict[str, int]:
        """Path -> step of everything that a start may go on from."""
        found = {}
        for folder in (self.save_folder, self.snapshot_folder):
            for path in folder.glob("*"):
                # A kill while one takes the place of another leaves the older one under this name.
                name = path.name.removeprefix(".replaced-")
                step = None if name.startswith(".") else step_of(path)
                if step is not None:
                    found[str(folder / name)] = step
        return found

    def leftovers(self) -> dict[str, list[str]]:
        """What is there of saves that did not finish, by folder."""
        return {folder.name: leftovers(folder) for folder in (self.save_folder, self.snapshot_folder)}


class Attempt:
    """The processes of one start, in a process group of their own, and their log."""

    def __init__(self, run: Run, folder: Path) -> None:
        self._log_file = folder / "rank0.txt"
        arguments = ["--config", run.config, "--run-dir", run.run_dir]
        folder.mkdir()

        def lead() -> int:
            fork_writers()
            if run.num_ranks == 1:
                rank = start_training(arguments, self._log_file)
                return rank.wait(1e6)
            return max(abs(code) for code in wait_for_all(start_ranks(arguments, folder, run.num_ranks), 1e6))

        self._leader = Forked(lead, folder / "leader.txt", own_group=True)
        self.are_writers_left = False
        self.started = time.monotonic()

    @property
    def log(self) -> str:
        """What the main rank has logged."""
        return self._log_file.read_text(encoding="utf-8") if self._log_file.exists() else ""

    @property
    def has_ended(self) -> bool:
        """Whether it ended by itself."""
        return self._leader.process.exitcode is not None

    def wait(self) -> int:
        """The exit code."""
        return self._leader.wait(1e6)

    def kill_ranks(self) -> None:
        """End all but the processes that write, and wait until they are gone."""
        leader = self._leader.pid
        ranks = [int(pid) for pid in Path(f"/proc/{leader}/task/{leader}/children").read_text().split()]
        for pid in (leader, *ranks):
            os.kill(pid, signal.SIGKILL)
        self._leader.process.join()
        for pid in ranks:
            os.waitpid(pid, 0)
        self.are_writers_left = True

    def kill(self) -> None:
        """End all its processes at once, and wait until they are gone."""
        group = self._leader.pid
        while not self.has_ended:
            try:
                os.killpg(group, signal.SIGKILL)
                break
            except ProcessLookupError:  # it has no group of its own yet
                time.sleep(0.001)
        self._leader.process.join()
        while True:
            try:
                os.waitpid(-group, 0)
            except ChildProcessError:
                return

    # What its log says.

    def resumed_from(self) -> tuple[int, str] | None:
        """Step and path."""
        found = re.search(r"resuming at step (\d+) of \d+ from (\S+)", self.log)
        return (int(found[1]), found[2]) if found else None

    def trained(self) -> int:
        """The last step; 0 when there is none."""
        return max(map(int, re.findall(r"step (\d+)/\d+  ", self.log)), default=0)

    def announced(self) -> int:
        """Step of the newest checkpoint or snapshot that is said to be saved; 0 when there is none."""
        return max(map(int, re.findall(r"step (\d+): saved (?:checkpoint|snapshot) \S+ \(", self.log)), default=0)


class Killer:
    """Kills a run again and again, and looks after each kill and each start whether all is well."""

    def __init__(self, run: Run, random: Random, *, spare_writers: bool) -> None:
        self.run = run
        self.spare_writers = spare_writers
        self.random = random
        self.phases: Counter[str] = Counter()
        self.lost: list[int] = []
        self._seconds_to_start = 1.0
        self.reached = 0  # the last step of the attempt before
        self._announced = 0
        self._before: dict[str, int] = {}
        self.attempts: list[Attempt] = []

    def kill_once(self, number: int) -> None:
        """Start, kill, and check."""
        leftovers_before = self.run.leftovers()
        self._before = self.run.complete()
        attempt = self.run.start()
        self._wait_for_a_random_instant(attempt, number * STEPS_PER_KILL)
        if self.spare_writers and attempt.trained() and self.random.random() < 0.3:
            attempt.kill_ranks()
        else:
            attempt.kill()
        self._check_start(attempt)
        self.attempts.append(attempt)
        self._announced = max(self._announced, attempt.announced())
        self.reached = max(attempt.trained(), (attempt.resumed_from() or (self.reached,))[0])
        self._count_phase(attempt, leftovers_before)
        self._check_folders(attempt, KEEP + 1)

    def finish(self) -> None:
        """Start a last time and wait for the end."""
        self._before = self.run.complete()
        attempt = self.run.start()
        code = attempt.wait()
        self._require(code == 0, attempt, f"exit code {code}")
        for earlier in self.attempts:
            if earlier.are_writers_left:
                earlier.kill()
        self._check_start(attempt)
        self._check_folders(attempt, KEEP)
        left = [name for names in self.run.leftovers().values() for name in names]
        self._require(not left, attempt, f"left in the end: {left}")

    def _wait_for_a_random_instant(self, attempt: Attempt, most_steps: int) -> None:
        if self.random.random() < 0.15:
            time.sleep(self.random.uniform(0, self._seconds_to_start))
            return
        while attempt.trained() == 0:
            self._require(not attempt.has_ended, attempt, "it ended by itself")
            time.sleep(0.002)
        self._seconds_to_start = 0.5 * (self._seconds_to_start + time.monotonic() - attempt.started)
        end = time.monotonic() + self.random.uniform(0, 0.6)
        # It must not reach its end.
        while time.monotonic() < end and attempt.trained() < most_steps:
            time.sleep(0.002)

    def _check_start(self, attempt: Attempt) -> None:
        resumed = attempt.resumed_from()
        is_alone = not (self.attempts and self.attempts[-1].are_writers_left)
        # An older run's process that still writes may be in the way of a save, which is then told.
        for word in ("Traceback", "refused", *(["ERROR"] if is_alone else [])):
            self._require(word not in attempt.log, attempt, f"its log has '{word}'")
        if resumed is None:
            is_new = "starting from scratch" in attempt.log
            self._require(not (is_new and self._announced), attempt, "it started anew, and there was a checkpoint")
            return
        step, path = resumed
        if is_alone:
            self._require(self._before.get(path) == step, attempt, f"{path} was no complete checkpoint of step {step}")
        self._require(step >= self._announced, attempt, f"it resumed at {step}, and {self._announced} was saved")
        self.lost.append(max(0, self.reached - step))

    def _count_phase(self, attempt: Attempt, before: dict[str, list[str]]) -> None:
        after = self.run.leftovers()
        if any(set(after[name]) - set(before[name]) for name in after):
            self.phases["during a save"] += 1
        elif attempt.trained():
            self.phases["in a step"] += 1
        else:
            self.phases["at the start"] += 1

    def _check_folders(self, attempt: Attempt, most: int) -> None:
        kept = [path for path in self.run.complete() if Path(path).parent == self.run.save_folder]
        self._require(len(kept) <= most, attempt, f"{len(kept)} checkpoints are kept")
        for folder, names in self.run.leftovers().items():
            self._require(len(names) <= MOST_LEFTOVERS, attempt, f"leftovers pile up in {folder}: {names}")

    def _require(self, condition: bool, attempt: Attempt, what: str) -> None:
        if not condition:
            attempt.kill()
            raise UnsafeError(f"start {self.run.num_attempts}: {what}; its log:\n{attempt.log}")


def numbers_of(run: Run) -> list[tuple[Any, ...]]:
    """What every step of a run must give again."""
    names = ("step", "loss", "grad_norm", "lr", "num_consumed_tokens", "num_consumed_samples")
    return [tuple(line[name] for name in names) for line in metrics_of(run.run_dir)]


def tensors_of(run: Run, step: int) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of a checkpoint."""
    reader = TensorReader(storage_path(run.save_folder / f"{step}"))
    return {key: reader.read_key(key) for key in reader.entries}


def kill_and_compare(
    folder: Path, *, kills: int, num_ranks: int = 1, in_background: bool = False, seed: int = 0
) -> str:
    """Kill a run `kills` times; returns figures in a few lines.

    Raises:
        UnsafeError: something was lost, or is not as it should be.
    """
    _adopt_orphans()
    total_steps = STEPS_PER_KILL * kills + 10
    whole = Run(folder / "whole", total_steps, num_ranks, in_background=False, saving=ONE_SAVE)
    reference = whole.start()
    if reference.wait() != 0:
        raise UnsafeError(f"the run that nobody kills fails:\n{reference.log}")
    run = Run(folder / "killed", total_steps, num_ranks, in_background=in_background, saving=SAVING)
    killer = Killer(run, Random(seed), spare_writers=in_background)
    started = time.monotonic()
    for number in range(1, kills + 1):
        killer.kill_once(number)
        if sys.stdout.isatty():
            print(f"\r{number} kills, step {killer.reached} of {total_steps}", end="", flush=True)
    killer.finish()
    if numbers_of(run) != numbers_of(whole):
        raise UnsafeError(f"the numbers of {run.run_dir} are not those of {whole.run_dir}")
    last, expected = tensors_of(run, total_steps), tensors_of(whole, total_steps)
    different = [key for key in expected if key not in last or not torch.equal(last[key], expected[key])]
    if different or last.keys() != expected.keys():
        raise UnsafeError(f"in the last checkpoints of {run.save_folder} and {whole.save_folder} differ {different}")
    phases = ", ".join(f"{count} {name}" for name, count in killer.phases.most_common())
    lost = killer.lost or [0]
    num_spared = sum(attempt.are_writers_left for attempt in killer.attempts)
    return (
        f"{kills} kills on {num_ranks} rank(s), {'saving in the background, ' if in_background else ''}seed {seed}: "
        f"{phases}{f'; {num_spared} left the writing processes alive' if num_spared else ''}\n"
        f"{len(killer.lost)} resumes, steps lost: {max(lost)} at most, {sum(lost) / len(lost):.2f} in the mean\n"
        f"all {total_steps} steps and the last checkpoint are those of a run that nobody killed; "
        f"{(time.monotonic() - started) / (kills + 1):.2f} s a start"
    )


def _adopt_orphans() -> None:
    """What a killed process leaves becomes a child of this one, which can then see it end."""
    PR_SET_CHILD_SUBREAPER = 36
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description="kill a run at random instants and compare it with one nobody killed")
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="how often (default: 50)")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="processes of the run (default: 1)")
    parser.add_argument("--async", action="store_true", dest="in_background", help="save in the background")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the instants (default: 0)")
    parser.add_argument("--folder", type=Path, help="where to work, kept afterwards (default: a temporary one)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    gc.freeze()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="kill-and-resume-"))
    try:
        print(
            kill_and_compare(
                folder,
                kills=options.kills,
                num_ranks=options.ranks,
                in_background=options.in_background,
                seed=options.seed,
            )
        )
    except UnsafeError as error:
        print(f"UNSAFE: {error}\nall files are in {folder}")
        return 1
    if options.folder is None:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
