"""Stages and places are two names of the same thing."""

from __future__ import annotations

import pytest

from internlm.core.scheduler.stage_placement import Placement

PLACEMENTS = [Placement(1), Placement(4), Placement(4, 3), Placement(1, 2, "v"), Placement(4, 2, "v")]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_each_stage_has_one_place_and_follows_the_one_before(placement: Placement) -> None:
    places = [placement.place_of(stage) for stage in range(placement.num_stages)]
    assert len(set(places)) == placement.num_ranks * placement.num_chunks
    assert [placement.stage_of(*place) for place in places] == list(range(placement.num_stages))
    assert [placement.after(*place) for place in places] == [*places[1:], None]
    assert [placement.before(*place) for place in places] == [None, *places[:-1]]


def test_a_v_turns_on_the_last_rank_and_ends_on_the_first() -> None:
    placement = Placement(3, 2, "v")
    assert [placement.place_of(stage).rank for stage in range(6)] == [0, 1, 2, 2, 1, 0]
    assert [Placement(3, 2).place_of(stage).rank for stage in range(6)] == [0, 1, 2, 0, 1, 2]


def test_impossible_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="num_ranks = 0"):
        Placement(0)
    with pytest.raises(ValueError, match="num_chunks = 3: shape"):
        Placement(2, 3, "v")
