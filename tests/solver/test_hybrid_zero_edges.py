"""What could go silently wrong in the sharded optimizer: NaN gradients, gathers that are late, odd parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import RankPool
from helpers.runs import assert_same_bits, new_trainer, train, weights_of
from helpers.tiny import global_batch, tiny_engine, tiny_model
from torch import Tensor, nn

import internlm.solver.optimizer.flat_bucket as flat_bucket
from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.engine import Engine
from internlm.core.parallel.shard_spec import ShardSpec, attach_shard_spec
from internlm.data.batch import Batch
from internlm.model.ops.attention import Segments
from internlm.model.ops.cross_entropy import LossOutput, linear_cross_entropy

LR = 3e-3


def context_of(zero: int = -1) -> ParallelContext:
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    return ParallelContext.create(ParallelLayout(world_size=world, zero=zero))


def share(step: int, context: ParallelContext) -> Batch:
    return global_batch(step, 4, context.rank, context.world_size)


# -- NaN ------------------------------------------------------------------------------------------------------------


def with_a_bad_step(zero: int, bad: int | None) -> tuple[list[float], dict[str, Tensor]]:
    """Three good steps, and a batch whose loss is NaN before step `bad`: which updates are skipped, and the weights."""
    context = context_of(zero)
    engine = tiny_engine(context, clip_grad_norm=0.5, weight_decay=0.1, reduce_bucket_size=3000)
    good = engine.loss

    def nan(*args: Tensor) -> LossOutput:
        return good(*args)._replace(loss_sum=good(*args).loss_sum * torch.nan)

    skipped = []
    for step in range(3):
        if step == bad:
            engine.loss = nan
            skipped.append(float(engine.train_step(share(9, context), LR).skipped))
            engine.loss = good
        skipped.append(float(engine.train_step(share(step, context), LR).skipped))
    engine.optimizer.finish_gathering()
    weights = weights_of(engine.model)
    context.close()
    return skipped, weights


@pytest.mark.parametrize(("world", "zero"), [(1, -1), (2, 1), (2, -1), (4, 2)])
def test_a_nan_gradient_leaves_no_trace(ranks: Callable[[int], RankPool], world: int, zero: int) -> None:
    """The update is skipped, and the next ones are those of a run that never saw the batch, bit for bit."""
    run = ranks(world).run if world > 1 else lambda function, *args: [function(*args)]
    clean = run(with_a_bad_step, zero, None)
    for (skipped, weights), (_, expected) in zip(run(with_a_bad_step, zero, 1), clean, strict=True):
        assert skipped == [0.0, 1.0, 0.0, 0.0]
        assert_same_bits(weights, expected)
