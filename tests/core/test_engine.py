"""What an engine is made of, and what it says when it fails."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers.pipelines import Run, batch_of, build_engine
from helpers.ranks import RankPool
from helpers.tiny import global_batch, tiny_engine, tiny_model

from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.engine import Engine
from internlm.core.scheduler.schedules import make_schedule
from internlm.core.token_statistics import TokenSums
from internlm.model.ops.cross_entropy import linear_cross_entropy


def fail_at(engine: Engine, number: int) -> None:
    """Let the loss of the micro batch with this number fail."""
    good, calls = engine.loss, iter(range(1000))

    def loss(*args: Any) -> Any:
        if next(calls) == number:
            raise ArithmeticError("on purpose")
        return good(*args)

    engine.loss = loss


def test_the_phase_of_a_failure() -> None:
    engine = tiny_engine(ParallelContext.create())
    assert str(engine.progress) == "start"
    fail_at(engine, 2)
    with pytest.raises(ArithmeticError):
        engine.train_step(global_batch(0), 1e-3)
    assert engine.progress.phase == "forward of micro-batch 2"
    fail_at(engine, 0)
    with pytest.raises(ArithmeticError):
        engine.evaluate(global_batch(0).micro_batches[0], TokenSums(1))
    assert engine.progress.phase == "forward of micro-batch 0"


def phases_of_a_failure() -> tuple[str, str]:
    """The last stage fails, and gives its connections up: phase and error on each rank."""
    context = ParallelContext.create(ParallelLayout(world_size=2, pipeline=2))
    engine = build_engine(Run("1F1B", 2, 2, model={"num_layers": 4}), context)
    fail_at(engine, 1)
    error = ""
    try:
        engine.train_step(batch_of(0, context, 4), 1e-3)
    except (ArithmeticError, RuntimeError) as failure:
        error = str(failure)
    context.close()
    return engine.progress.phase, error


def test_a_failed_stage_fails_the_others(ranks: Callable[[int], RankPool]) -> None:
    (waiting, consequence), (failed, cause) = ranks(2).run(phases_of_a_failure)
    assert (failed, cause) == ("forward of micro-batch 1, chunk 1", "on purpose")
    assert waiting.startswith(("receive gradient of micro-batch ", "receive activation of micro-batch ", "send "))
    assert "closed" in consequence.lower()


def test_chunks_must_be_those_of_the_schedule() -> None:
    context = ParallelContext.create()
    model = tiny_model(context)
    engine = tiny_engine(context, model=model)
    assert engine.model is model
    schedule = partial(make_schedule, "1F1B", 1, num_chunks=2)
    with pytest.raises(ValueError, match="1 pipeline ranks of 2 chunks, but there are 1 ranks and this one has 1"):
        Engine(model, engine.optimizer, context, linear_cross_entropy, schedule=schedule)
    with pytest.raises(ValueError, match="parallelize first"):
        Engine(torch.nn.Linear(1, 1), engine.optimizer, context, linear_cross_entropy)


def test_several_chunks_are_no_one_model() -> None:
    context = ParallelContext.create()
    engine = build_engine(Run("1F1B", 1, 2, model={"num_layers": 4}), context)
    with pytest.raises(ValueError, match="2 chunks"):
        _ = engine.model


def test_chunks_on_one_rank_are_the_model() -> None:
    """Cut and put together again: the same numbers, without any communication."""
    context = ParallelContext.create()
    whole, cut = (build_engine(Run("1F1B", 1, chunks, model={"num_layers": 4}), context) for chunks in (1, 2))
    for step in range(3):
        expected, found = (engine.train_step(batch_of(step, context, 4), 1e-2) for engine in (whole, cut))
        assert float(found.loss) == float(expected.loss)
        assert found.statistics == expected.statistics
