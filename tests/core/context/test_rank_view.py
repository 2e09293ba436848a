"""Rank arithmetic: pure, and right for thousands of ranks in one process."""

from __future__ import annotations

import itertools

import pytest

from internlm.core.context.layout import ParallelLayout
from internlm.utils.errors import ConfigError


def test_rank_order_is_tensor_innermost_then_data_then_pipeline() -> None:
    layout = ParallelLayout(world_size=16, pipeline=2, tensor=2, zero=2)
    view = layout.activation
    assert view.coordinate(0) == {"pipeline": 0, "data": 0, "context": 0, "tensor": 0}
    assert view.group("tensor", 5) == (4, 5)
    assert view.group("data", 5) == (1, 3, 5, 7)
    assert view.group("pipeline", 5) == (5, 13)
    assert view.index("data", 5) == 2
    assert layout.weight_view.group("data", 5) == (1, 3, 5, 7)
    assert layout.weight_view.group("zero", 5) == (5, 7)
    assert layout.weight_view.group("data_replica", 5) == (1, 5)


def test_isp_lays_out_weights_apart_from_activations() -> None:
    layout = ParallelLayout(world_size=8, tensor=2, weight=4, mode="isp")
    assert layout.activation.group("tensor", 3) == (2, 3)
    assert layout.activation.group("data", 3) == (1, 3, 5, 7)
    assert layout.weight_view.group("weight", 3) == (0, 1, 2, 3)
    assert layout.weight_view.group("weight_data", 3) == (3, 7)
    assert layout.weight_view.group("zero", 3) == (3, 7)


@pytest.mark.parametrize(
    "layout",
    [
        ParallelLayout(world_size=4096, pipeline=8, tensor=8, zero=16),
        ParallelLayout(world_size=4096, pipeline=4, tensor=4, context=2, zero=8, expert=16, expert_inner=2),
        ParallelLayout(world_size=1024, pipeline=2, tensor=8, weight=16, zero=4, mode="isp"),
    ],
    ids=str,
)
def test_groups_of_every_axis_partition_thousands_of_ranks(layout: ParallelLayout) -> None:
    for view in layout.views:
        assert view.world_size == layout.world_size
        for axis in (*view.axes, *view.merged):
            groups = view.groups(axis)
            assert sorted(itertools.chain(*groups)) == list(range(layout.world_size))
            for group in (groups[0], groups[-1], groups[len(groups) // 2]):
                assert len(group) == view.size(axis)
                for position, rank in enumerate(group):
                    assert view.group(axis, rank) == group
                    assert view.index(axis, rank) == position


def test_sizes_that_do_not_fit_are_refused_with_the_numbers() -> None:
    with pytest.raises(ConfigError, match=r"tensor = 4 does not divide the world size 6"):
        ParallelLayout(world_size=6, tensor=4)
    with pytest.raises(ConfigError, match=r"zero = 3 does not divide the 4 ranks of the same weights"):
        ParallelLayout(world_size=4, zero=3)
    with pytest.raises(KeyError, match="no axis 'weight'"):
        ParallelLayout(world_size=4).activation.size("weight")
