"""Shares within one sample at every sample, whatever the weights; positions to continue from; ends and changes."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest

from internlm.data.sources.blend_order import (
    BlendCursor,
    BlendOrder,
    BlendPosition,
    GroupShare,
    SourceShare,
    to_fraction,
)
from internlm.utils.errors import ConfigError


def always(weight: float) -> tuple[tuple[int, Fraction], ...]:
    return ((0, to_fraction(weight)),)


def order_of(*weights: float) -> BlendOrder:
    return BlendOrder([SourceShare(f"s{number:02}", always(weight)) for number, weight in enumerate(weights)])


def weights_of(seed: int) -> list[float]:
    draw = random.Random(seed)
    kinds = (
        draw.random,
        lambda: draw.randint(1, 9),
        lambda: draw.random() ** 6 + 1e-9,
        lambda: math.pi ** draw.random(),
    )
    return [draw.choice(kinds)() for _ in range(draw.choice((1, 2, 3, 4, 5, 8, 13, 30)))]


@pytest.mark.parametrize("seed", range(40))
def test_counts_are_within_one_sample_of_the_weights(seed: int) -> None:
    weights = weights_of(seed)
    total = sum(map(to_fraction, weights))
    shares = [to_fraction(weight) / total for weight in weights]
    order, bound = order_of(*weights), 1 - Fraction(1, max(2 * len(weights) - 2, 1))
    cursor = BlendCursor(order, order.beginning)
    for index in range(600):
        taken = cursor.take()
        assert taken is not None and cursor.index == index + 1
        for share, count in zip(shares, cursor.counts, strict=True):
            assert abs(count - share * (index + 1)) <= bound


def test_every_sample_of_a_source_is_taken_once_and_in_order() -> None:
    order = order_of(0.5, 0.3, 0.2)
    cursor = BlendCursor(order, order.beginning)
    taken = [cursor.take() for _ in range(100)]
    for source, count in enumerate((50, 30, 20)):
        assert [own for number, own in filter(None, taken) if number == source] == list(range(count))


@pytest.mark.parametrize("seed", range(20))
def test_a_position_continues_as_if_never_left(seed: int) -> None:
    order = order_of(*weights_of(seed))
    straight = BlendCursor(order, order.beginning)
    taken = [straight.take() for _ in range(500)]
    skipping = BlendCursor(order, order.beginning)
    skipping.advance_to(337)
    resumed = BlendCursor(order, skipping.position)
    assert [resumed.take() for _ in range(163)] == taken[337:]
    assert resumed.position == straight.position


def test_far_samples_are_found_at_once() -> None:
    order = order_of(0.3, 0.25, 0.15, 0.2, 0.1)
    far = BlendCursor(order, order.beginning)
    far.advance_to(20 * 10**12 + 7)
    near = BlendCursor(order, order.beginning)
    near.advance_to(7)
    assert far.counts == [count + int(10**12 * part) for count, part in zip(near.counts, (6, 5, 3, 4, 2), strict=True)]


def test_the_order_of_the_members_decides_nothing() -> None:
    shares = [SourceShare(name, always(weight)) for name, weight in (("a", 0.4), ("b", 0.4), ("c", 0.2))]
    first, second = (BlendOrder(members) for members in (shares, shares[::-1]))
    cursors = [BlendCursor(order, order.beginning) for order in (first, second)]
    assert [cursors[0].take() for _ in range(50)] == [cursors[1].take() for _ in range(50)]


def test_equally_urgent_sources_are_taken_by_name() -> None:
    """A run that resumes with a later version of this code finds the order of the earlier one."""
    for weights, expected in (
        ((0.5, 0.5), [0, 1] * 4),
        ((1, 1, 1), [0, 1, 2] * 3),
        ((0.4, 0.4, 0.2), [0, 1, 2, 0, 1] * 2),
    ):
        order = order_of(*weights)
        cursor = BlendCursor(order, order.beginning)
        assert [number for number, _ in filter(None, (cursor.take() for _ in expected))] == expected


def test_groups_share_their_weight() -> None:
    order = BlendOrder(
        [
            SourceShare("en", always(3)),
            GroupShare(always(1), (SourceShare("a", always(1)), SourceShare("b", always(2)))),
        ]
    )
    assert order.weights_at(0, (0, 0, 0)) == {"en": Fraction(3, 4), "a": Fraction(1, 12), "b": Fraction(1, 6)}


def test_scheduled_weights_are_exact_from_their_sample() -> None:
    schedule = ((0, Fraction(9, 10)), (101, Fraction(0)), (200, Fraction(1, 3)))
    others = ((0, Fraction(1, 10)), (101, Fraction(1)), (200, Fraction(2, 3)))
    order = BlendOrder([SourceShare("a", schedule), SourceShare("b", others)])
    cursor = BlendCursor(order, order.beginning)
    counts = [0]
    for _ in range(400):
        cursor.take()
        counts.append(cursor.counts[0])
    for start, stop, share in ((0, 101, 0.9), (101, 200, 0.0), (200, 400, 1 / 3)):
        for index in range(start, stop):
            assert abs(counts[index] - counts[start] - share * (index - start)) <= 0.5 + 1e-9
    assert [index for index, _ in cursor.changes] == [0, 101, 200]
    # Neither skipping periods nor stopping at a change of weights makes a difference.
    for stop in (100, 101, 102, 199, 200, 201):
        skipping = BlendCursor(order, order.beginning)
        skipping.advance_to(stop)
        assert skipping.counts[0] == counts[stop]
        resumed = BlendCursor(order, skipping.position)
        resumed.advance_to(400)
        assert resumed.position == cursor.position


def test_a_source_that_has_ended_is_dropped_or_ends_the_blend() -> None:
    members = [
        SourceShare("a", always(0.5), limit=30, on_end="drop"),
        SourceShare("b", always(0.3)),
        SourceShare("c", always(0.2), limit=100, on_end="stop"),
    ]
    order = BlendOrder(members)
    cursor = BlendCursor(order, order.beginning)
    taken = list(iter(cursor.take, None))
    last = max(index for index, (source, _) in enumerate(taken) if source == 0)
    assert [(source, own) for source, own in taken[: last + 1] if source == 0] == [(0, own) for own in range(30)]
    assert cursor.changes[1] == (last + 1, {"b": Fraction(3, 5), "c": Fraction(2, 5)})
    for index in range(last + 1, len(taken)):
        rest = [source for source, _ in taken[last + 1 : index + 1]]
        assert abs(rest.count(1) - 0.6 * len(rest)) < 1
    assert cursor.counts[2] == 100 and cursor.end is not None and "'c' has ended after 100 samples" in cursor.end
    for index in (1, last, last + 1, last + 2, len(taken)):
        skipping = BlendCursor(order, order.beginning)
        skipping.advance_to(index)
        resumed = BlendCursor(order, skipping.position)
        assert list(iter(resumed.take, None)) == taken[index:]


def test_without_sources_left_the_blend_ends() -> None:
    order = BlendOrder([SourceShare("a", always(1), limit=3, on_end="drop")])
    cursor = BlendCursor(order, order.beginning)
    cursor.advance_to(10)
    assert cursor.index == 3 and cursor.end == "every source with a weight has ended"
    again = BlendCursor(order, cursor.position)
    assert again.take() is None and again.end == cursor.end


def test_other_weights_count_shares_from_the_position() -> None:
    before = order_of(0.9, 0.1)
    cursor = BlendCursor(before, before.beginning)
    cursor.advance_to(57)
    after = order_of(0.2, 0.8)
    changed = BlendCursor(after, BlendPosition(57, tuple(cursor.counts), 57, tuple(cursor.counts), {}))
    for count in range(1, 200):
        changed.take()
        assert abs(changed.counts[0] - cursor.counts[0] - 0.2 * count) <= 0.5 + 1e-9


def test_refused_blends() -> None:
    with pytest.raises(ConfigError, match="several sources of one name"):
        BlendOrder([SourceShare("a", always(1)), SourceShare("a", always(1))])
    with pytest.raises(ConfigError, match="all weights of the blend are 0 from sample 50 on"):
        BlendOrder([SourceShare("a", ((0, Fraction(1)), (50, Fraction(0))))])
