"""A rank of two fails, hangs or is killed: both end within 30 s, not with 0, and the last line of each log says why."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.commands import LAUNCHER_VARIABLES, last_log_line, metrics_of, start_ranks, write_config
from helpers.processes import Forked, wait_for_all

import internlm.commands.train as train
import internlm.core.failure as failure
from internlm.core.engine import Engine
from internlm.data.tokenized_files.writer import TokenizedWriter

LIMIT_SECONDS = 30
REPOSITORY = Path(__file__).parents[2]

# As a user would register a model, with a trap in it.
RAISING_MODEL = """
import os as _os
from internlm.model.families.internlm2 import internlm2 as _internlm2
from internlm.model.registry import register_model as _register_model

@_register_model("TRAPPED")
def _trapped(config, norm_dtype):
    model = _internlm2(config, norm_dtype)
    calls = []
    def trap(module, arguments):
        calls.append(1)
        if len(calls) == 3 and _os.environ["RANK"] == "1":
            raise RuntimeError("the trap has sprung")
    model.register_forward_pre_hook(trap)
    return model

model_type = "TRAPPED"
data["micro_num"] = 1
"""


def test_an_exception_on_one_rank_ends_both_under_torchrun(tmp_path: Path) -> None:
    config, run_dir = write_config(tmp_path, RAISING_MODEL), tmp_path / "run"
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(REPOSITORY / "train.py"), "--config", str(config), "--run-dir", str(run_dir)]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=2 * LIMIT_SECONDS,  # importing torch, and torchrun itself, take some of it
        env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
    )
    assert result.returncode != 0
    cause = "rank 1 failed in phase 'forward of micro-batch 0, step 3': RuntimeError: the trap has sprung"
    assert last_log_line(run_dir, 1).endswith(": " + cause)
    assert last_log_line(run_dir, 0).endswith("stopped because " + cause)
    assert "rank 1" in result.stderr
    assert [line["step"] for line in metrics_of(run_dir)] == [1, 2]


def trap(rank: int, step: int, action: Any) -> Any:
    """Calls `action` on one rank in a forward pass of a step."""

    def install(this_rank: int) -> None:
        if this_rank != rank:
            return
        original = Engine.train_step
        steps: list[int] = []

        def train_step(self: Engine, *args: Any) -> Any:
            steps.append(1)
            if len(steps) == step:
                self._forward = action  # type: ignore[method-assign]
            return original(self, *args)

        Engine.train_step = train_step  # type: ignore[method-assign]

    return install


def fail(*args: object) -> None:
    raise RuntimeError("the trap\nhas sprung")


def hang(*args: object) -> None:
    time.sleep(1000)


def quicker_watch(rank: int) -> None:
    failure.POLL_SECONDS, failure.GRACE_SECONDS = 0.2, 0.5


def train_on_two_ranks(tmp_path: Path, *before: Any, more: str = "") -> list[Forked]:
    config = write_config(tmp_path, more)

    def install(rank: int) -> None:
        for trap in before:
            trap(rank)

    return start_ranks(
        ["--config", config, "--run-dir", tmp_path / "run", "--set", "data.micro_num=1"], tmp_path, before=install
    )


def test_a_rank_that_hangs_is_ended_when_the_other_fails(tmp_path: Path) -> None:
    ranks = train_on_two_ranks(tmp_path, trap(0, 3, hang), trap(1, 3, fail))
    assert wait_for_all(ranks, LIMIT_SECONDS) == [1, 1]
    cause = "rank 1 failed in phase 'forward of micro-batch 0, step 3': RuntimeError: the trap; has sprung"
    assert last_log_line(tmp_path / "run", 0).endswith("stopped because " + cause)
    assert last_log_line(tmp_path / "run", 1).endswith(": " + cause)
    # The main rank's terminal tells it, too, and the failing one's has the traceback.
    assert cause in ranks[0].output
    assert "Traceback" in ranks[1].output


def test_a_mistake_of_the_user_on_one_rank_ends_both(tmp_path: Path) -> None:
    """A folder that one machine cannot see: exit code 2 there, no traceback anywhere."""
    more = "import os\ndata['train_folder'] = '/nowhere' if os.environ['SLURM_PROCID'] == '1' else None"
    ranks = train_on_two_ranks(tmp_path, quicker_watch, more=more)
    assert wait_for_all(ranks, LIMIT_SECONDS) == [1, 2], ranks[0].output
    assert "rank 1 failed in phase 'start': DataError: /nowhere: no such folder" in last_log_line(tmp_path / "run", 1)
    assert "stopped because rank 1 failed in phase 'start': DataError" in last_log_line(tmp_path / "run", 0)
    assert "Traceback" not in ranks[0].output + ranks[1].output


def test_what_the_main_rank_finds_missing_ends_all(tmp_path: Path) -> None:
    ranks = train_on_two_ranks(tmp_path, quicker_watch, more="data['train_folder'] = '/nowhere'")
    assert wait_for_all(ranks, LIMIT_SECONDS) == [2, 2], ranks[0].output
    assert "DataError: /nowhere: no such folder" in last_log_line(tmp_path / "run", 0)
    assert "DataError: /nowhere: no such folder" in last_log_line(tmp_path / "run", 1)
    assert "Traceback" not in ranks[0].output + ranks[1].output


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_data_in_the_middle_of_a_run_names_document_and_rank(tmp_path: Path, num_workers: int) -> None:
    """A token id beyond the vocabulary, which one of the ranks meets on its way."""
    folder = tmp_path / "data" / "books"
    folder.mkdir(parents=True)
    with TokenizedWriter(folder / "a.bin") as writer:
        for document in range(40):
            writer.write(np.full(32, 200 if document == 23 else document + 1))
    more = f"data.update(train_folder={str(folder.parent)!r}, num_worker={num_workers})"
    ranks = train_on_two_ranks(tmp_path, quicker_watch, more=more)
    codes = wait_for_all(ranks, LIMIT_SECONDS)
    assert sorted(codes) == [1, 2]
    guilty = codes.index(2)
    cause = last_log_line(tmp_path / "run", guilty)
    assert f"rank {guilty} failed in phase 'loading a batch, step " in cause
    assert "a.bin" in cause and "200" in cause
    assert f"stopped because rank {guilty} failed" in last_log_line(tmp_path / "run", 1 - guilty)
    assert "Traceback" not in ranks[guilty].output


def spoil_losses(rank: int) -> None:
    """From the second rank's third step on, its losses are not finite."""
    original = Engine.train_step
    steps: list[int] = []

    def train_step(self: Engine, *args: Any) -> Any:
        steps.append(1)
        if len(steps) == 3 and rank == 1:
            loss = self.loss
            self.loss = lambda *args, **kwargs: spoiled(loss(*args, **kwargs))  # type: ignore[assignment]
        return original(self, *args)

    def spoiled(output: Any) -> Any:
        return output._replace(loss_sum=output.loss_sum * np.nan)

    Engine.train_step = train_step  # type: ignore[method-assign]


def test_updates_that_are_all_skipped_end_the_run_on_all_ranks(tmp_path: Path) -> None:
    ranks = train_on_two_ranks(tmp_path, quicker_watch, spoil_losses, more="monitor = dict(max_skipped_updates=3)")
    assert wait_for_all(ranks, LIMIT_SECONDS) == [2, 2], ranks[0].output
    lines = [last_log_line(tmp_path / "run", rank) for rank in (0, 1)]
    for line in lines:
        assert (
            "in phase 'health: on_step_end, step 6': TrainingError: step 5: 3 consecutive updates were skipped" in line
        )
        assert re.search(
            r"the gradients of \d+ are not, and the first one .* is that of 'output.weight' \(on rank", line
        )
    assert [line["skipped"] for line in metrics_of(tmp_path / "run")][:5] == [0, 0, 1, 1, 1]
    assert "Traceback" not in ranks[0].output + ranks[1].output


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_takes_the_other_with_it(tmp_path: Path, victim: int) -> None:
    def shoot(*args: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    ranks = train_on_two_ranks(tmp_path, quicker_watch, trap(victim, 3, shoot))
    codes = wait_for_all(ranks, LIMIT_SECONDS)
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 1
    last = last_log_line(tmp_path / "run", 1 - victim)
    assert f"rank {1 - victim} failed in phase" in last or "the rank that held the job's store is gone" in last


def test_ranks_that_end_at_different_times_are_not_taken_for_dead(tmp_path: Path) -> None:
    """Rank 1 is still at work long after rank 0, which holds the store, has done all."""

    def dawdle(rank: int) -> None:
        if rank == 1:
            original = train._log_end
            train._log_end = lambda *args: (time.sleep(2), original(*args))  # type: ignore[assignment,func-returns-value]

    assert wait_for_all(train_on_two_ranks(tmp_path, quicker_watch, dawdle), LIMIT_SECONDS) == [0, 0]
