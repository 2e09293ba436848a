"""One rank fails, all stop and name the cause. Ranks here are forked processes that hold a store and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist
from helpers.processes import Forked, free_port, wait_for_all

import internlm.core.failure as failure
from internlm.core.failure import EXIT_CODE, FailureWatch, describe_error
from internlm.utils.errors import ConfigError
from internlm.utils.logging import configure_logging, get_logger

POLL, GRACE = 0.1, 0.4


def start(folder: Path, work: Callable[[int, FailureWatch], int], world_size: int = 2) -> list[Forked]:
    """`work(rank, watch)` on every rank, under a watch that is quicker than the real one; rank 0 holds the store."""
    port = free_port()

    def run(rank: int) -> int:
        failure.POLL_SECONDS, failure.GRACE_SECONDS = POLL, GRACE
        configure_logging(rank, folder / f"rank{rank}.log")
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
        with FailureWatch(rank, world_size) as watch:
            return work(rank, watch)

    return [Forked(lambda rank=rank: run(rank), folder / f"rank{rank}.txt") for rank in range(world_size)]  # type: ignore[misc]


def fail(rank: int, watch: FailureWatch, message: str = "on purpose") -> int:
    get_logger().error("%s", watch.report(RuntimeError(message), "forward, step 3"))
    return 1


def last_line(folder: Path, rank: int) -> str:
    return (folder / f"rank{rank}.log").read_text().splitlines()[-1]


CAUSE = "rank {} failed in phase 'forward, step 3': RuntimeError: on purpose"


@pytest.mark.parametrize("failing", [0, 1], ids=["holder-of-the-store-fails", "holder-of-the-store-hangs"])
def test_a_rank_that_hangs_is_ended_when_another_one_fails(tmp_path: Path, failing: int) -> None:
    def work(rank: int, watch: FailureWatch) -> int:
        if rank == failing:
            return fail(rank, watch)
        time.sleep(1000)
        return 0

    codes = wait_for_all(start(tmp_path, work), 20)
    assert codes == [1, EXIT_CODE]
    assert last_line(tmp_path, failing).endswith(" internlm: " + CAUSE.format(failing))
    assert last_line(tmp_path, 1 - failing).endswith("stopped because " + CAUSE.format(failing))


def test_an_error_that_follows_from_another_rank_is_not_taken_for_the_cause(tmp_path: Path) -> None:
    """Rank 1 fails; rank 0, which holds the store, sees a broken connection and leaves; rank 2 hangs all the while."""

    def work(rank: int, watch: FailureWatch) -> int:
        if rank == 1:
            return fail(rank, watch)
        while not watch._store.check([failure.KEY]):
            time.sleep(0.001)
        if rank == 0:
            return fail(rank, watch, "Connection closed by peer")
        time.sleep(1000)
        return 0

    assert wait_for_all(start(tmp_path, work, 3), 20) == [1, 1, EXIT_CODE]
    assert last_line(tmp_path, 0).endswith("stopped because " + CAUSE.format(1))
    assert last_line(tmp_path, 1).endswith(" internlm: " + CAUSE.format(1))
    assert last_line(tmp_path, 2).endswith("stopped because " + CAUSE.format(1))


def test_a_rank_ends_when_the_holder_of_the_store_was_killed(tmp_path: Path) -> None:
    ready = tmp_path / "ready"

    def work(rank: int, watch: FailureWatch) -> int:
        if rank == 1:
            ready.touch()
        time.sleep(1000)
        return 0

    holder, other = start(tmp_path, work)
    other.wait_until(ready.exists)
    holder.kill()
    assert wait_for_all([holder, other], 20) == [-9, EXIT_CODE]
    assert last_line(tmp_path, 1).endswith("stopped because the rank that held the job's store is gone")


def test_an_error_after_the_holder_of_the_store_was_killed_says_so(tmp_path: Path) -> None:
    ready, killed = tmp_path / "ready", tmp_path / "killed"

    def work(rank: int, watch: FailureWatch) -> int:
        if rank == 1:
            ready.touch()
            while not killed.exists():
                time.sleep(0.001)
            return fail(rank, watch)
        time.sleep(1000)
        return 0

    holder, other = start(tmp_path, work)
    other.wait_until(ready.exists)
    holder.kill()
    killed.touch()
    assert wait_for_all([holder, other], 20)[1] == 1
    assert CAUSE.format(1) in last_line(tmp_path, 1)
    assert "the rank that held the job's store is gone" in last_line(tmp_path, 1)


def test_the_cause_is_known_after_the_holder_of_the_store_has_failed_and_left(tmp_path: Path) -> None:
    """Rank 0 fails and exits; only then does rank 1 see a broken connection."""
    gone = tmp_path / "gone"

    def work(rank: int, watch: FailureWatch) -> int:
        if rank == 0:
            return fail(rank, watch)
        failure.GRACE_SECONDS = 10.0
        while not gone.exists():
            time.sleep(0.001)
        return fail(rank, watch, "Connection closed by peer")

    holder, other = start(tmp_path, work)
    assert holder.wait(20) == 1
    gone.touch()
    assert other.wait(20) == 1
    assert last_line(tmp_path, 1).endswith("stopped because " + CAUSE.format(0))


def test_nobody_is_ended_in_a_run_that_goes_well(tmp_path: Path) -> None:
    """Several polls long, and with ranks that leave at different times."""

    def work(rank: int, watch: FailureWatch) -> int:
        time.sleep(3 * POLL + (2 * (POLL + GRACE) if rank == 0 else 0))
        return 0

    assert wait_for_all(start(tmp_path, work), 20) == [0, 0]
    assert (tmp_path / "rank0.log").read_text() == ""


def test_one_process_has_nobody_to_tell() -> None:
    with FailureWatch(0, 1) as watch:
        cause = watch.report(RuntimeError("on purpose"), "forward, step 3")
    assert cause == CAUSE.format(0)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RuntimeError("a\n\n  b\nc"), "RuntimeError: a; b; c"),
        (ConfigError(["first", "second"]), "ConfigError: first; second"),
        (ConfigError("differs:\n  first\n  second"), "ConfigError: differs: first; second"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
    ],
)
def test_a_cause_is_one_line(error: BaseException, text: str) -> None:
    assert describe_error(error) == text
