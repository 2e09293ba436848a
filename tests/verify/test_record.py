"""Putting together what ranks hold: every element is there, and copies are equal."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.shard_spec import Box, ShardSpec
from internlm.verify.record import (
    InconsistentRanksError,
    RankRecord,
    RankStep,
    TensorBox,
    boxes_of,
    describe_placement,
    join_ranks,
)

WHOLE = np.arange(12, dtype=np.float32).reshape(4, 3)


def rows(start: int, stop: int, change: float = 0.0) -> TensorBox:
    """Some rows of `WHOLE`, with the last element off by `change`."""
    values = WHOLE[start:stop].copy()
    values[-1, -1] += change
    return TensorBox("w", (4, 3), (start, 0), values)


def rank(*pieces: TensorBox, loss: float = 1.0) -> RankRecord:
    """A rank with these gradients, which are its weights, too."""
    return RankRecord(list(pieces), [RankStep(loss, 2.0, list(pieces), list(pieces))], {"w": "split over tensor"})


def test_boxes_make_the_whole() -> None:
    record = join_ranks([rank(rows(0, 2)), rank(rows(2, 3), rows(3, 4)), rank(rows(0, 4))])
    for tensors in (record.initial, record.steps[0].gradients, record.steps[0].weights):
        assert np.array_equal(tensors["w"], WHOLE)
    assert (record.steps[0].loss, record.steps[0].grad_norm) == (1.0, 2.0)


def test_a_scalar_is_joined() -> None:
    box = TensorBox("w", (), (), np.array(2.5, dtype=np.float32))
    whole = join_ranks([rank(box), rank(box)]).initial["w"]
    assert whole.shape == () and whole == 2.5


def test_a_part_on_no_rank_is_an_error() -> None:
    with pytest.raises(InconsistentRanksError, match="w: 3 of 12 elements are on no rank"):
        join_ranks([rank(rows(0, 2)), rank(rows(3, 4))])


def test_copies_that_drift_apart_are_an_error() -> None:
    drift = float(np.spacing(np.float32(11)))
    with pytest.raises(InconsistentRanksError, match=r"initial weight of w: .* rank 0 and rank 2 differ by .*tensor"):
        join_ranks([rank(rows(0, 4)), rank(rows(0, 2)), rank(rows(2, 4, drift))])


def test_losses_that_differ_between_ranks_are_an_error() -> None:
    with pytest.raises(InconsistentRanksError, match="step 1: loss differs between ranks"):
        join_ranks([rank(rows(0, 4)), rank(rows(0, 4), loss=1.5)])


def test_nan_on_all_ranks_is_left_to_the_comparison() -> None:
    nan = TensorBox("w", (1,), (0,), np.array([np.nan], dtype=np.float32))
    record = join_ranks([rank(nan, loss=float("nan")), rank(nan, loss=float("nan"))])
    assert np.isnan(record.steps[0].loss)


def test_pieces_are_copies_of_boxes_in_fp32() -> None:
    box = Box((2, 0), (0, 0), (2, 3))
    spec = ShardSpec("w", (4, 3), (2, 3), (box,))
    tensor = torch.tensor(WHOLE[2:], dtype=torch.bfloat16)
    (piece,) = boxes_of(spec, [(box, tensor)])
    tensor.zero_()
    assert piece.values.dtype == np.float32
    assert np.array_equal(piece.values, WHOLE[2:])
    assert (piece.name, piece.slices) == ("w", (slice(2, 4), slice(0, 3)))


def test_a_placement_names_the_axes() -> None:
    context = ParallelContext(ParallelLayout(world_size=8, tensor=2, zero=2), 0, torch.device("cpu"))
    norm = ShardSpec("norm", (4,), (4,), (Box((0,), (0,), (4,)),), partial_over=("tensor",))
    assert describe_placement(norm, context) == (
        "copied over data_replica x zero x tensor, gradient summed over data x tensor"
    )
    column = ShardSpec("w", (4,), (2,), (Box((0,), (0,), (2,)),), sharded_over=("tensor",))
    assert describe_placement(column, context) == (
        "split over tensor, copied over data_replica x zero, gradient summed over data"
    )
    alone = ParallelContext(ParallelLayout(), 0, torch.device("cpu"))
    assert describe_placement(norm, alone) == "on one rank"
