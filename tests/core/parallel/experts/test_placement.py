"""Every layout of experts divides their weights without a gap or an overlap."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.experts.placement import place_experts
from internlm.core.parallel.shard_spec import ShardSpec
from internlm.utils.errors import ConfigError

SHAPES = {"w13": (6, 8, 3), "w2": (6, 3, 4)}


def specs(layout: ParallelLayout, attribute: str) -> Iterator[ShardSpec]:
    for rank in range(layout.world_size):
        context = ParallelContext(layout, rank, torch.device("cpu"))
        (part,) = place_experts(context, f"layers.0.feed_forward.experts.{attribute}", attribute, SHAPES[attribute])
        assert part.attribute == attribute
        yield part.spec


LAYOUTS = [
    *(ParallelLayout(24, mode="isp", expert=ep, expert_inner=n) for ep in (1, 2, 3) for n in (1, 2, 4)),
    *(ParallelLayout(24, mode="isp", expert_inner=n) for n in (3, 6, 12)),
    *(ParallelLayout(8, tensor=t, expert=ep, expert_inner=t, mode="msp") for t in (1, 2, 4) for ep in (1, 2)),
]


@pytest.mark.parametrize("attribute", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.mode},{layout.expert}x{layout.expert_inner}")
def test_parts_of_the_ranks_are_the_weight(layout: ParallelLayout, attribute: str) -> None:
    found = np.zeros(SHAPES[attribute], dtype=int)
    for spec in specs(layout, attribute):
        local = np.zeros(spec.local_shape, dtype=int)
        for box in spec.boxes:
            found[box.global_slices()] += 1
            local[box.local_slices()] += 1
        assert local.max() <= 1
        padding = sum(np.prod(size) for _, size in spec.padding())
        assert local.sum() + padding == local.size
        # Padding is less than one row for each of the ranks that share a copy.
        assert padding <= SHAPES[attribute][2] * layout.expert_inner
    parts = layout.expert * layout.expert_inner
    assert (found == layout.world_size // parts).all()


def test_tensor_ranks_have_as_many_rows_of_w1_as_of_w3() -> None:
    first, second = specs(ParallelLayout(2, tensor=2, expert_inner=2), "w13")
    assert [box.global_offset[1] for box in first.boxes] == [0, 4]
    assert [box.global_offset[1] for box in second.boxes] == [2, 6]
    assert {box.size for box in first.boxes} == {(6, 2, 3)}


def test_parts_that_are_not_equal_are_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be dealt evenly to 4 expert ranks"):
        list(specs(ParallelLayout(4, expert=4), "w2"))
    with pytest.raises(ConfigError, match="the width of an expert = 4 is not divisible by tensor = 3"):
        list(specs(ParallelLayout(3, tensor=3, expert_inner=3), "w2"))
    with pytest.raises(ConfigError, match="split over all tensor ranks or none"):
        list(specs(ParallelLayout(4, tensor=4, expert_inner=2), "w2"))
