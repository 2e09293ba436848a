"""Boxes: any flat range of any sharded tensor is covered exactly once, at the right global place."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm.core.parallel.shard_spec import Box, ShardSpec


def fused_columns(ranks: int, rank: int, rows: int, columns: int) -> ShardSpec:
    """A [2 * rows, columns] weight, two fused halves, each split by rows: two boxes a rank."""
    part = rows // ranks
    boxes = tuple(Box((half * rows + rank * part, 0), (half * part, 0), (part, columns)) for half in range(2))
    return ShardSpec("w13", (2 * rows, columns), (2 * part, columns), boxes)


def rows_split(ranks: int, rank: int, rows: int, columns: int) -> ShardSpec:
    """A [rows, columns] weight split by columns."""
    part = columns // ranks
    return ShardSpec("wo", (rows, columns), (rows, part), (Box((0, rank * part), (0, 0), (rows, part)),))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=0, max_size=4), st.data())
def test_a_flat_range_of_a_whole_tensor(shape: list[int], data: st.DataObject) -> None:
    whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
    spec = ShardSpec.whole("w", shape)
    start = data.draw(st.integers(0, whole.numel()))
    stop = data.draw(st.integers(0, whole.numel()))
    seen = [int(v) for box in spec.boxes_of_flat_range(start, stop) for v in whole[box.global_slices()].flatten()]
    assert seen == list(range(start, stop))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([fused_columns, rows_split]), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.data())
def test_ranges_of_sharded_tensors_cover_the_global_one_once(make, ranks, part, other, data) -> None:  # type: ignore[no-untyped-def]
    whole = None
    covered = None
    for rank in range(ranks):
        spec = make(ranks, rank, part * ranks, other * ranks)
        if whole is None:
            whole = torch.arange(torch.Size(spec.global_shape).numel()).reshape(spec.global_shape)
            covered = torch.zeros_like(whole)
        local = torch.full(spec.local_shape, -1)
        for box in spec.boxes:
            local[box.local_slices()] = whole[box.global_slices()]
        assert (local >= 0).all()
        cut = data.draw(st.integers(0, local.numel()))
        for start, stop in ((0, cut), (cut, local.numel())):
            for box in spec.boxes_of_flat_range(start, stop):
                assert torch.equal(local[box.local_slices()], whole[box.global_slices()])
                covered[box.global_slices()] += 1  # type: ignore[index]
    assert covered is not None
    assert (covered == 1).all()
