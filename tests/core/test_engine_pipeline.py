"""Training in a pipeline is training: loss, gradients, norm and weights are those of one process.

Without a tied embedding everything but the norm is equal bit for bit: each weight is on one rank, which adds the
gradients of the micro batches in the same order, and the loss is summed by one rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from helpers.pipelines import Results, Run, together, train
from helpers.ranks import RankPool
from helpers.runs import assert_same_bits

EPSILON = torch.finfo(torch.float32).eps

NORM_TOLERANCE = 1e-6
"""Relative. The norm is the root of sums of fp32 squares over rows of a bucket, and stages have other buckets than the
whole model: a row of 1024 squares errs by a few epsilon (1.2e-7), and rows err to either side."""


def alone(run: Run) -> Results:
    """The same training in this process."""
    return together([train(replace(run, mode="1F1B", pipeline=1, num_chunks=1, sizes=None))])


def in_pipeline(pool: RankPool, run: Run) -> Results:
    return together(pool.run(train, run))


def assert_equal(found: Results, expected: Results) -> None:
    assert found.losses == expected.losses
    assert found.norms == pytest.approx(expected.norms, rel=NORM_TOLERANCE)
    assert found.valid_tokens == expected.valid_tokens
    assert found.statistics == expected.statistics
    assert found.evaluation == expected.evaluation
    assert_same_bits(found.gradients, {name: expected.gradients[name] for name in found.gradients})
    assert_same_bits(found.weights, {name: expected.weights[name] for name in found.weights})
    assert found.weights.keys() == found.gradients.keys() == expected.weights.keys()


@pytest.mark.parametrize(
    ("world", "run"),
    [
        (2, Run("1F1B", 2)),
        (2, Run("1F1B", 2, micro_num=1)),
        (2, Run("1F1B", 2, micro_num=5, sizes=(1, 3))),
        (2, Run("1F1B", 2, 2)),
        (2, Run("1F1B", 2, 3, micro_num=6, sizes=(1, 2, 1, 1, 2, 1))),
        (2, Run("ZBH1", 2, micro_num=3)),
        (2, Run("ZBV", 2, 2, micro_num=5, sizes=(2, 1, 4, 1))),
        (2, Run("DUALPIPEV", 2, 2, micro_num=5)),
        (4, Run("1F1B", 4, micro_num=7)),
        (4, Run("1F1B", 4, 2, micro_num=8)),
        (4, Run("ZBH1", 4, micro_num=7, sizes=(1, 4, 2, 1))),
        (4, Run("ZBV", 4, 2, micro_num=9)),
        (4, Run("DUALPIPEV", 4, 2, micro_num=9)),
        (4, Run("DUALPIPEV", 4, 2, micro_num=2)),
    ],
    ids=str,
)
def test_every_schedule_equals_one_process(ranks: Callable[[int], RankPool], world: int, run: Run) -> None:
    num_layers = sum(run.sizes) if run.sizes else 8
    run = replace(run, model={"num_layers": num_layers})
    assert_equal(in_pipeline(ranks(world), run), alone(run))


@pytest.mark.parametrize(
    "run",
    [
        Run("1F1B", 2, model={"num_layers": 4, "checkpoint": True}),
        Run("ZBV", 2, 2, model={"num_layers": 4, "checkpoint": 0.5}),
        Run("1F1B", 2, model={"num_layers": 2, "residual_in_fp32": True, "dtype": "torch.bfloat16"}),
        Run("1F1B", 2, 2, model={"num_layers": 4}, optimizer={"overlap_sync_grad": False, "overlap_sync_param": True}),
    ],
    ids=["recomputed", "half recomputed", "fp32 residual stream", "overlaps"],
)
def test_other_ways_to_run_a_stage(ranks: Callable[[int], RankPool], run: Run) -> None:
    assert_equal(in_pipeline(ranks(2), run), alone(run))


@pytest.mark.parametrize("run", [Run("1F1B", 2), Run("1F1B", 2, 2), Run("ZBV", 2, 2)], ids=str)
def test_pipelines_beside_data_parallelism(ranks: Callable[[int], RankPool], run: Run) -> None:
    """Two data ranks add the same two numbers, with a pipeline and without."""
    run = replace(run, micro_num=8, model={"num_layers": 4}, optimizer={"reduce_bucket_size": 3000})
    expected = together(ranks(2).run(train, replace(run, mode="1F1B", pipeline=1, num_chunks=1)))
    assert_equal(in_pipeline(ranks(4), run), expected)


@pytest.mark.parametrize(
    ("world", "run"),
    [(2, Run("1F1B", 2)), (2, Run("ZBV", 2, 2)), (4, Run("1F1B", 2)), (4, Run("1F1B", 4, 2)), (4, Run("ZBV", 4, 2))],
    ids=str,
)
def test_a_tied_embedding(ranks: Callable[[int], RankPool], world: int, run: Run) -> None:
    """The embedding sums 2 terms a micro batch, one process pair by pair, a pipeline by ends (and by data ranks)."""
    run = replace(run, micro_num=4, model={"num_layers": 8, "tie_word_embeddings": True})
    one_step = replace(run, steps=1)
    data_ranks = world // run.pipeline

    def without_pipeline(run: Run) -> Results:
        run = replace(run, mode="1F1B", pipeline=1, num_chunks=1)
        return alone(run) if data_ranks == 1 else together(ranks(data_ranks).run(train, run))

    found, expected = in_pipeline(ranks(world), one_step), without_pipeline(one_step)
    tied = "tok_embeddings.weight"
    difference = (found.gradients.pop(tied) - expected.gradients[tied]).abs().max()
    # Each of the sums of n numbers errs by at most (n - 1) epsilon / 2 times the sum of their absolute values, which
    # is not known here; the numbers are of one size, so n times the largest result stands for it.
    num_terms = 2 * run.micro_num
    assert difference <= num_terms**2 * EPSILON * expected.gradients[tied].abs().max()
    found_weight, expected_weight = found.weights.pop(tied), expected.weights.pop(tied)
    expected.gradients.pop(tied)
    assert_equal_but_evaluation(found, expected)
    # AdamW's first step is its learning rate times the sign of the gradient: a gradient that rounding carries over 0
    # moves a weight by twice the learning rate, 0.02.
    assert ((found_weight - expected_weight).abs() > 1e-5).float().mean() < 0.01

    found, expected = in_pipeline(ranks(world), run), without_pipeline(run)
    # Five steps carry the rounding on; the invariant of every layout is 1e-5 on the loss.
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert found.norms == pytest.approx(expected.norms, rel=1e-4)


def assert_equal_but_evaluation(found: Results, expected: Results) -> None:
    assert_equal(replace(found, evaluation={}), replace(expected, evaluation={}))
