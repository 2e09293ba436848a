"""RunControl to stop and to save: what is decided, at which step, and that all ranks decide the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch.distributed as dist
from helpers.ranks import RankPool

from internlm.core.run_control import ELSEWHERE, RunControl

Asked = dict[int, list[tuple[int, str, object]]]
"""step -> (rank, method, argument): asked of that rank during that step."""


def decisions(asked: Asked, steps: int = 8, world: int = 1) -> list[tuple[int, str | None, str | None]]:
    """(step, stop reason, save reason) of every step at which there is one, until a stop."""
    rank = dist.get_rank() if world > 1 else 0
    requests = RunControl(dist.group.WORLD if world > 1 else None)
    found = []
    for step in range(1, steps + 1):
        for who, method, argument in asked.get(step, []):
            if who == rank:
                getattr(requests, method)(argument)
        requests.agree(step)
        if requests.stop_reason or requests.save_reason:
            found.append((step, requests.stop_reason, requests.save_reason))
        if requests.stop_reason:
            break
    requests.finish()
    return found


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, []),
        ({3: [(0, "stop", "why")]}, [(3, "why", None)]),
        ({3: [(0, "save", "why")]}, [(3, None, "why")]),
        # Two in one step are one; a later one is another.
        ({3: [(0, "save", "a"), (0, "save", "b")], 5: [(0, "save", "c")]}, [(3, None, "b"), (5, None, "c")]),
        ({3: [(0, "save", "a"), (0, "stop", "b")]}, [(3, "b", "a")]),
        ({2: [(0, "at", 6)]}, [(6, "asked for at step 6", None)]),
        ({2: [(0, "at", -6)]}, [(6, None, "asked for at step 6")]),
        # Taken back, or put off, in time.
        ({2: [(0, "at", 6)], 5: [(0, "at", 0)]}, []),
        ({2: [(0, "at", 4)], 3: [(0, "at", 7)]}, [(7, "asked for at step 7", None)]),
        # The same step is saved once, however long the request stands, and again when it is given anew.
        ({2: [(0, "at", -3)], 5: [(0, "at", 0)], 7: [(0, "at", -7)]},
         [(3, None, "asked for at step 3"), (7, None, "asked for at step 7")]),
        # Too late.
        ({5: [(0, "at", 2)]}, [(5, "asked for at step 2, which had passed", None)]),
        ({5: [(0, "at", -2)]}, [(5, None, "asked for at step 2, which had passed")]),
    ],
)  # fmt: skip
def test_one_process_decides_in_the_step_in_which_it_is_asked(
    asked: Asked, expected: list[tuple[int, str | None, str | None]]
) -> None:
    assert decisions(asked) == expected


def test_several_ranks_decide_the_same_one_step_later(ranks: Callable[[int], RankPool]) -> None:
    def decided(asked: Asked) -> list[list[tuple[int, str | None, str | None]]]:
        return ranks(2).run(decisions, asked, 8, 2)

    assert decided({3: [(1, "stop", "why")]}) == [[(4, ELSEWHERE, None)], [(4, "why", None)]]
    assert decided({3: [(0, "save", "a")], 4: [(1, "save", "b")]}) == [
        [(4, None, "a"), (5, None, ELSEWHERE)],
        [(4, None, ELSEWHERE), (5, None, "b")],
    ]
    assert decided({3: [(0, "stop", "a"), (1, "stop", "b")]}) == [[(4, "a", None)], [(4, "b", None)]]


def test_a_step_that_one_rank_read_is_met_by_all(ranks: Callable[[int], RankPool]) -> None:
    def decided(asked: Asked) -> list[list[tuple[int, str | None, str | None]]]:
        return ranks(2).run(decisions, asked, 8, 2)

    assert decided({2: [(0, "at", 5)]}) == [[(5, "asked for at step 5", None)]] * 2
    assert decided({2: [(0, "at", -3)]}) == [[(3, None, "asked for at step 3")]] * 2
    # Read in the step itself: known to all one step later.
    assert decided({5: [(0, "at", 5)]}) == [[(6, "asked for at step 5, which had passed", None)]] * 2
