"""The short version of `tests/kill_and_resume.py`: a run that is killed ten times at random instants loses nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.forked import run_forked
from kill_and_resume import kill_and_compare


@pytest.mark.parametrize(("num_ranks", "in_background"), [(1, False), (2, True)])
def test_a_killed_run_is_the_run_that_nobody_killed(tmp_path: Path, num_ranks: int, in_background: bool) -> None:
    def kill() -> None:
        print(kill_and_compare(tmp_path, kills=10, num_ranks=num_ranks, in_background=in_background, seed=5))

    # In a process of its own, as it adopts what killed ones leave.
    printed = run_forked(tmp_path, kill)
    assert printed.startswith(f"10 kills on {num_ranks} rank(s)")
    assert "all 70 steps and the last checkpoint are those of a run that nobody killed" in printed
