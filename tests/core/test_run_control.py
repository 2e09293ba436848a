"""Requests to stop and to save: the decision, its step, and that all ranks agree."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch.distributed as dist
from helpers.ranks import RankPool

from internlm.core.run_control import REQUESTED_ELSEWHERE, RunControl

Requests = dict[int, list[tuple[int, str, object]]]
"""step -> (rank, method, argument): requests received by that rank during that step."""


def decisions(requests: Requests, steps: int = 8, world: int = 1) -> list[tuple[int, str | None, str | None]]:
    """(step, stop reason, save reason) of every step at which there is one, until a stop."""
    rank = dist.get_rank() if world > 1 else 0
    control = RunControl(dist.group.WORLD if world > 1 else None)
    found = []
    for step in range(1, steps + 1):
        for who, method, argument in requests.get(step, []):
            if who == rank:
                getattr(control, method)(argument)
        control.agree(step)
        if control.stop_reason or control.save_reason:
            found.append((step, control.stop_reason, control.save_reason))
        if control.stop_reason:
            break
    control.finish()
    return found


@pytest.mark.parametrize(
    ("requests", "expected"),
    [
        ({}, []),
        ({3: [(0, "request_stop", "why")]}, [(3, "why", None)]),
        ({3: [(0, "request_save", "why")]}, [(3, None, "why")]),
        # Two requests in one step give one save; a later request another.
        ({3: [(0, "request_save", "a"), (0, "request_save", "b")], 5: [(0, "request_save", "c")]},
         [(3, None, "b"), (5, None, "c")]),
        ({3: [(0, "request_save", "a"), (0, "request_stop", "b")]}, [(3, "b", "a")]),
        ({2: [(0, "request_at", 6)]}, [(6, "requested for step 6", None)]),
        ({2: [(0, "request_at", -6)]}, [(6, None, "requested for step 6")]),
        # Withdrawn, or moved to a later step, in time.
        ({2: [(0, "request_at", 6)], 5: [(0, "request_at", 0)]}, []),
        ({2: [(0, "request_at", 4)], 3: [(0, "request_at", 7)]}, [(7, "requested for step 7", None)]),
        # The same step is saved once, however long the request stands, and again on a new request.
        ({2: [(0, "request_at", -3)], 5: [(0, "request_at", 0)], 7: [(0, "request_at", -7)]},
         [(3, None, "requested for step 3"), (7, None, "requested for step 7")]),
        # Too late.
        ({5: [(0, "request_at", 2)]}, [(5, "requested for step 2, which had passed", None)]),
        ({5: [(0, "request_at", -2)]}, [(5, None, "requested for step 2, which had passed")]),
    ],
)  # fmt: skip
def test_one_process_decides_in_the_step_in_which_it_is_asked(
    requests: Requests, expected: list[tuple[int, str | None, str | None]]
) -> None:
    assert decisions(requests) == expected


def test_several_ranks_decide_the_same_one_step_later(ranks: Callable[[int], RankPool]) -> None:
    def decided(requests: Requests) -> list[list[tuple[int, str | None, str | None]]]:
        return ranks(2).run(decisions, requests, 8, 2)

    assert decided({3: [(1, "request_stop", "why")]}) == [[(4, REQUESTED_ELSEWHERE, None)], [(4, "why", None)]]
    assert decided({3: [(0, "request_save", "a")], 4: [(1, "request_save", "b")]}) == [
        [(4, None, "a"), (5, None, REQUESTED_ELSEWHERE)],
        [(4, None, REQUESTED_ELSEWHERE), (5, None, "b")],
    ]
    assert decided({3: [(0, "request_stop", "a"), (1, "request_stop", "b")]}) == [[(4, "a", None)], [(4, "b", None)]]


def test_a_step_requested_on_one_rank_holds_on_all(ranks: Callable[[int], RankPool]) -> None:
    def decided(requests: Requests) -> list[list[tuple[int, str | None, str | None]]]:
        return ranks(2).run(decisions, requests, 8, 2)

    assert decided({2: [(0, "request_at", 5)]}) == [[(5, "requested for step 5", None)]] * 2
    assert decided({2: [(0, "request_at", -3)]}) == [[(3, None, "requested for step 3")]] * 2
    # Requested in the step itself: known to all ranks one step later.
    assert decided({5: [(0, "request_at", 5)]}) == [[(6, "requested for step 5, which had passed", None)]] * 2
