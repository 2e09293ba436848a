"""Context ranks in a layout: who shares what, for hundreds of layouts, and the groups of InternEvo's 2D attention."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict

import pytest

from internlm.core.context.layout import ParallelLayout, TensorMode
from internlm.core.context.ring_order import ring_order
from internlm.utils.errors import ConfigError

MODES: tuple[TensorMode, ...] = ("mtp", "msp", "fsp", "isp")

Groups = set[frozenset[int]]


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def random_layout(mode: TensorMode, seed: int) -> ParallelLayout:
    """Any sizes that fit together, on up to 1296 ranks."""
    draw = random.Random(f"{mode}/{seed}")
    sizes = {axis: draw.choice((1, 2, 3, 4, 6)) for axis in ("pipeline", "tensor", "context", "data")}
    stage = sizes["tensor"] * sizes["context"] * sizes.pop("data")
    is_isp = mode == "isp"
    weight = draw.choice(divisors(stage)) if is_isp else 1
    inner = draw.choice(divisors(stage)) if is_isp else draw.choice((1, sizes["tensor"]))
    return ParallelLayout(
        world_size=sizes["pipeline"] * stage,
        **sizes,
        mode=mode,
        weight=weight,
        zero=draw.choice((-1, *divisors(stage // (weight if is_isp else sizes["tensor"])))),
        expert=draw.choice(divisors(stage // inner)),
        expert_inner=inner,
        head_first=not is_isp or draw.random() < 0.5,
        kv_replicas=1 if is_isp else draw.choice(divisors(sizes["tensor"])),
    )


def groups_by(ranks: range, key: dict[int, tuple[int, ...]]) -> Groups:
    """The sets of ranks with equal keys."""
    found = defaultdict(set)
    for rank in ranks:
        found[key[rank]].add(rank)
    return {frozenset(group) for group in found.values()}


@pytest.mark.parametrize("mode", MODES)
def test_who_shares_what_in_any_layout(mode: TensorMode) -> None:
    for seed in range(100):
        check_who_shares_what(random_layout(mode, seed))


def check_who_shares_what(layout: ParallelLayout) -> None:
    """From the definition of the order of ranks, without a view."""
    ranks, t, c = range(layout.world_size), layout.tensor, layout.context
    stage_size = layout.world_size // layout.pipeline
    stage = {rank: rank // stage_size for rank in ranks}
    sample = {rank: (rank // (t * c),) for rank in ranks}
    within = {rank: rank % (t * c) for rank in ranks}
    tensor = {rank: within[rank] % t if layout.head_first else within[rank] // c for rank in ranks}
    context = {rank: within[rank] // t if layout.head_first else within[rank] % c for rank in ranks}

    activation, weight = layout.activation, layout.weight_view
    for view in layout.views:
        for axis in (*view.axes, *view.merged):
            assert sorted(itertools.chain(*view.groups(axis))) == [*ranks], (layout, view, axis)

    def groups(view: str, axis: str) -> Groups:
        chosen = {"activation": activation, "weight": weight}[view]
        assert all(group == tuple(sorted(group)) for group in chosen.groups(axis)), "torch sorts the ranks of a group"
        return {frozenset(group) for group in chosen.groups(axis)}

    assert groups("activation", "sample") == groups_by(ranks, sample)
    assert groups("activation", "tensor") == groups_by(ranks, {r: (*sample[r], context[r]) for r in ranks})
    assert groups("activation", "context") == groups_by(ranks, {r: (*sample[r], tensor[r]) for r in ranks})
    assert groups("activation", "data") == groups_by(ranks, {r: (stage[r], within[r]) for r in ranks})
    for rank in ranks:
        assert activation.index("tensor", rank) == tensor[rank]
        assert activation.index("context", rank) == context[rank]

    part = {rank: rank % layout.weight if layout.is_isp else tensor[rank] for rank in ranks}
    same_weights = groups_by(ranks, {r: (stage[r], part[r]) for r in ranks})
    data = "weight_data" if layout.is_isp else "data"
    assert groups("weight", data) == same_weights
    for zero in groups("weight", "zero"):
        assert len(zero) == (layout.zero if layout.zero > 0 else layout.weight_data_size)
        assert any(zero <= group for group in same_weights)


def test_ranks_of_one_sample_share_the_optimizer_state_first() -> None:
    """ZeRO over as many ranks as a sample has stays among them, as context is next to data in the order of ranks."""
    layout = ParallelLayout(world_size=16, tensor=2, context=4, zero=4)
    assert layout.weight_view.groups("zero")[:2] == [(0, 2, 4, 6), (1, 3, 5, 7)]
    assert layout.weight_view.group("data", 3) == (1, 3, 5, 7, 9, 11, 13, 15)


@pytest.mark.parametrize("head_first", [True, False])
@pytest.mark.parametrize(("head", "context", "data"), [(2, 4, 2), (4, 2, 3), (1, 4, 2), (4, 1, 2), (3, 2, 1)])
def test_groups_of_internevos_2d_attention(head_first: bool, head: int, context: int, data: int) -> None:
    """HEAD groups are consecutive ranks and CONTEXT groups stride over them, or the other way round."""
    size = head * context
    layout = ParallelLayout(
        world_size=size * data, mode="isp", tensor=head, context=context, weight=size, head_first=head_first
    )
    heads, contexts = [], []
    for first in range(0, size * data, size):
        ranks = range(first, first + size)
        outer, inner = (context, head) if head_first else (head, context)
        consecutive = [tuple(ranks[number * inner : (number + 1) * inner]) for number in range(outer)]
        strided = [tuple(ranks[number::inner]) for number in range(inner)]
        heads += consecutive if head_first else strided
        contexts += strided if head_first else consecutive
    assert sorted(layout.activation.groups("tensor")) == sorted(heads)
    assert sorted(layout.activation.groups("context")) == sorted(contexts)


def internevos_windows(ranks: list[int], size: int, interleaved: bool) -> tuple[list[list[int]], list[list[int]]]:
    """INTRA_WINDOW and INTER_WINDOW groups by InternEvo's rule, see its comments on 16 ranks below."""
    if not interleaved:
        windows = [ranks[first : first + size] for first in range(0, len(ranks), size)]
        return windows, [[window[place] for window in windows] for place in range(size)]
    even, odd = ([rank for rank in ranks if rank % 2 == parity] for parity in (0, 1))
    starts = [start for first in range(0, len(even), size) for start in (even[first], odd[first])]
    inter = [[r for j in range(place, len(even), size) for r in (even[j], odd[j])] for place in range(size)]
    return [[start + 2 * place for place in range(size)] for start in starts], inter


@pytest.mark.parametrize("context", [1, 2, 4, 6, 8, 12, 16, 24, 32, 64])
def test_windows_are_those_of_internevo(context: int) -> None:
    for size, interleaved in itertools.product(divisors(context), (False, True)):
        if interleaved and context // size % 2:
            continue
        windows = ring_order(context, size, interleaved)
        intra, inter = internevos_windows([*range(context)], size, interleaved)
        assert windows == intra
        assert [list(places) for places in zip(*windows, strict=True)] == inter


def test_windows_of_16_ranks() -> None:
    assert ring_order(16, 4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert ring_order(16, 4, True) == [[0, 2, 4, 6], [1, 3, 5, 7], [8, 10, 12, 14], [9, 11, 13, 15]]
    assert ring_order(4, 1) == ring_order(4, 1, True) == [[0], [1], [2], [3]]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"window_size = 4 does not divide context = 6; use 1, 2, 3, 6"):
        ring_order(6, 4)
    with pytest.raises(ConfigError, match=r"interleaved = True needs an even number of windows, and there are 3"):
        ring_order(6, 2, True)
    with pytest.raises(ConfigError, match=r"head_first = False needs mode = 'isp', which is mtp"):
        ParallelLayout(world_size=4, context=2, head_first=False)
    with pytest.raises(ConfigError, match=r"zero = 3 does not divide the 8 ranks of the same weights"):
        ParallelLayout(world_size=16, tensor=2, context=4, zero=3)
    with pytest.raises(ConfigError, match=r"context = 3"):
        ParallelLayout(world_size=16, tensor=2, context=3)
