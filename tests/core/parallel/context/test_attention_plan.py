"""Plans of attention between context ranks, proven without processes."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from internlm.core.parallel.context.attention_plan import AttentionPlan, make_plan, num_rows
from internlm.core.parallel.context.movement import MOVEMENT_NAMES, Movement, make_movement
from internlm.core.parallel.context.simulator import check_plans
from internlm.core.parallel.context.token_cut import CUT_NAMES, CutName, cut_tokens
from internlm.core.parallel.context.token_pieces import TokenPieces


def random_lengths(num_tokens: int, rng: random.Random) -> list[int]:
    """Documents of one token, none, few and many tokens."""
    lengths, left = [], num_tokens
    while left:
        lengths.append(rng.choice([0, 1, rng.randint(1, min(left, 9)), rng.randint(1, left)]))
        left -= lengths[-1]
    return lengths


def movements(num_ranks: int, rng: random.Random) -> Iterator[Movement]:
    """Every movement; the double ring with any windows, of ranks in any order."""
    for name in MOVEMENT_NAMES:
        if name != "double_ring":
            yield make_movement(name, num_ranks)
    size = rng.choice([w for w in range(1, num_ranks + 1) if num_ranks % w == 0])
    ranks = rng.sample(range(num_ranks), num_ranks)
    windows = tuple(tuple(ranks[i : i + size]) for i in range(0, num_ranks, size))
    yield make_movement("double_ring", num_ranks, windows)


def plans_of(
    lengths: list[int], num_ranks: int, cut: CutName, movement: Movement, window: int | None
) -> list[AttentionPlan]:
    pieces = TokenPieces.of(lengths, cut_tokens(lengths, num_ranks, cut))
    return [make_plan(pieces, movement, rank, window) for rank in range(num_ranks)]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 6, 8])
def test_every_query_sees_its_keys_once_and_every_gradient_comes_home(num_ranks: int) -> None:
    rng = random.Random(num_ranks)
    for _ in range(12):
        num_tokens = num_ranks * rng.randint(1, 20)
        lengths = random_lengths(num_tokens, rng)
        for name in CUT_NAMES:
            cut = cut_tokens(lengths, num_ranks, name)
            for window in (None, 1, 2, rng.randint(1, num_tokens)):
                for movement in movements(num_ranks, rng):
                    plans = plans_of(lengths, num_ranks, name, movement, window)
                    check_plans(plans, lengths, cut, window)


def test_the_checks_find_wrong_plans() -> None:
    lengths, cut = [5, 23, 9, 27], cut_tokens([5, 23, 9, 27], 4, "zigzag")
    right = plans_of(lengths, 4, "zigzag", make_movement("ring", 4), None)
    check_plans(right, lengths, cut, None)

    def changed(rank: int, number: int, **changes: Any) -> list[AttentionPlan]:
        steps = list(right[rank].steps)
        steps[number] = dataclasses.replace(steps[number], **changes)
        plans = list(right)
        plans[rank] = dataclasses.replace(right[rank], steps=tuple(steps))
        return plans

    step = right[1].steps[1]
    source, tiles = step.computations[0]
    shorter = tiles[0]._replace(k_stop=tiles[0].k_stop - 1)
    other_step = tuple(each._replace(arrival=each.arrival + 1) for each in step.key_sends)
    for wrong in (
        {"computations": ()},
        {"computations": (step.computations[0]._replace(tiles=(shorter, *tiles[1:])),)},
        {"computations": (*step.computations, step.computations[0])},
        {"key_sends": ()},
        {"key_sends": other_step},
        {"gradient_sends": ()},
        {"gradient_receives": ()},
    ):
        with pytest.raises(AssertionError):
            check_plans(changed(1, 1, **wrong), lengths, cut, None)
    with pytest.raises(AssertionError):
        check_plans(right, lengths, cut, 3)
    assert source != 1


def test_work_is_the_number_of_visible_pairs_and_of_tiles_before_merging() -> None:
    rng = random.Random(0)
    for _ in range(40):
        num_ranks = rng.choice([1, 2, 3, 4])
        lengths = random_lengths(num_ranks * rng.randint(1, 20), rng)
        window = rng.choice([None, 1, rng.randint(1, sum(lengths))])
        document = np.repeat(np.arange(len(lengths)), lengths)
        distance = np.arange(len(document))[:, None] - np.arange(len(document))
        visible = (document[:, None] == document) & (distance >= 0)
        if window is not None:
            visible &= distance < window
        for name in CUT_NAMES:
            cut = cut_tokens(lengths, num_ranks, name)
            pairs, tiles = TokenPieces.of(lengths, cut).work(window)
            assert pairs.tolist() == [visible[cut.indices(rank)].sum() for rank in range(num_ranks)]
            plans = plans_of(lengths, num_ranks, name, make_movement("direct", num_ranks), window)
            for rank, plan in enumerate(plans):
                merged = sum(len(each.tiles) for step in plan.steps for each in step.computations)
                assert tiles[rank] >= merged


# -- bytes: the formulas of the movements, for one document -----------------------------------------------------------


def rows_sent(plan: AttentionPlan, kind: str) -> int:
    return sum(num_rows(plan.rows_of(each)) for step in plan.steps for each in getattr(step, kind))


@pytest.mark.parametrize("name", ["ring", "direct", "all_gather"])
def test_a_zigzag_rank_sends_its_keys_to_each_other_rank_once(name: str) -> None:
    """A zigzag chunk r is before queries of all ranks, chunk 2c - 1 - r before those of ranks below r."""
    c, share = 4, 8
    plans = plans_of([c * share], c, "zigzag", make_movement(name, c), None)
    for rank, plan in enumerate(plans):
        if name == "ring":
            # A block is passed on whole, c - 1 times; all but rank 0's have rows in front of queries of each rank.
            assert rows_sent(plan, "key_sends") <= (c - 1) * share
            assert rows_sent(plan, "gradient_sends") <= (c - 1) * share
        else:
            assert rows_sent(plan, "key_sends") == (c - 1) * share // 2 + rank * share // 2
    total = sum(rows_sent(plan, "key_sends") for plan in plans)
    assert total == sum(rows_sent(plan, "gradient_sends") for plan in plans)
    if name != "ring":
        # Half of what a ring of whole blocks sends, and half a chunk for each pair of ranks more.
        assert total == c * (c - 1) * share * 3 // 4


def test_a_window_needs_a_halo_only() -> None:
    """Contiguous ranks send the last W - 1 keys in front of the next rank's queries."""
    c, share, window = 4, 16, 5
    plans = plans_of([c * share], c, "contiguous", make_movement("direct", c), window)
    assert [rows_sent(plan, "key_sends") for plan in plans] == [window - 1] * (c - 1) + [0]
    assert [rows_sent(plan, "gradient_sends") for plan in plans] == [0] + [window - 1] * (c - 1)
    across_two = plans_of([c * share], c, "contiguous", make_movement("direct", c), share + window)
    assert [rows_sent(plan, "key_sends") for plan in across_two] == [
        *[share + window - 1] * (c - 2),
        share,
        0,
    ]


def test_documents_of_one_rank_send_nothing() -> None:
    plans = plans_of([8, 8, 8, 8], 4, "contiguous", make_movement("ring", 4), None)
    for plan in plans:
        assert [len(step.computations) for step in plan.steps] == [1] + [0] * (len(plan.steps) - 1)
        assert rows_sent(plan, "key_sends") == rows_sent(plan, "gradient_sends") == 0


def test_a_double_ring_crosses_between_windows_once_a_window() -> None:
    """c / w - 1 of the messages of each rank leave its window, forward and backward."""
    c, w = 8, 4
    windows = (tuple(range(4)), tuple(range(4, 8)))
    plans = plans_of([c * 16], c, "zigzag", make_movement("double_ring", c, windows), None)
    for rank, plan in enumerate(plans):
        for kind in ("key_sends", "gradient_sends"):
            peers = [each.peer for step in plan.steps for each in getattr(step, kind)]
            assert sum(peer // w != rank // w for peer in peers) == c // w - 1
            assert len(peers) <= c - 1
