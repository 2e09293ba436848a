"""Training of a tiny model in any pipeline, and its results put together again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from helpers.tiny import micro_batch, tiny_config
from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.engine import Engine
from internlm.core.parallel.model_parallel import ParallelOptions
from internlm.core.parallel.pipeline_stages import build_stages, split_layers
from internlm.core.scheduler.schedules import make_schedule
from internlm.core.token_statistics import TokenSums, TypeMetrics, evaluation_results
from internlm.data.batch import Batch
from internlm.model.ops.cross_entropy import linear_cross_entropy
from internlm.model.registry import build_model
from internlm.solver.optimizer.hybrid_zero import HybridZeroOptimizer

LENGTHS = ((7, 1, 12), (5, 9), (16,), (3, 3, 8, 2))
"""Documents of a sample by its number: micro batches of one step differ in length."""

MASKED = (0.1, 0.5, 0.3, 1.0)
"""Share of masked labels of a sample by its number: every fourth has none left."""


@dataclass(frozen=True)
class Run:
    """How to train.

    Attributes:
        sizes: layers of each stage; None: as many on each.
        micro_num: samples of a step over all data ranks.
        model: changes to the tiny config.
        optimizer: arguments of the optimizer.
        float8_layers: see `ParallelOptions`.
    """

    mode: str = "1F1B"
    pipeline: int = 1
    num_chunks: int = 1
    sizes: Sequence[int] | None = None
    micro_num: int = 4
    steps: int = 5
    model: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    float8_layers: range = range(0)


@dataclass
class Results:
    """What came of it; weights and gradients by global name."""

    losses: list[float]
    norms: list[float]
    valid_tokens: list[float]
    statistics: dict[str, float]
    evaluation: dict[str, float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def batch_of(step: int, context: ParallelContext, micro_num: int) -> Batch:
    """A data rank's share of a step."""
    indices = list(range(step * micro_num, (step + 1) * micro_num))[context.index("data") :: context.size("data")]
    micros = [micro_batch(index, LENGTHS[index % 4], MASKED[index % 4]) for index in indices]
    return Batch(micros, num_samples=micro_num, sample_indices=indices)


def build_engine(run: Run, context: ParallelContext) -> Engine:
    """The engine of one rank."""
    schedule = partial(make_schedule, run.mode, run.pipeline, num_chunks=run.num_chunks)
    placement = schedule(run.pipeline).placement
    config = tiny_config(**run.model)
    chunks = build_stages(
        partial(build_model, "INTERNLM2", config),
        context,
        placement,
        split_layers(config.num_layers, placement.num_stages, sizes=run.sizes),
        seed=7,
        options=ParallelOptions(postpone_weight_gradients=run.mode != "1F1B", float8_layers=run.float8_layers),
    )
    optimizer = HybridZeroOptimizer(
        chunks, context, **{"weight_decay": 0.1, "reduce_bucket_size": 20000, **run.optimizer}
    )
    loss = partial(linear_cross_entropy, with_accuracy=True)
    return Engine(chunks, optimizer, context, loss, TypeMetrics(["text"]), schedule)


def train(run: Run) -> dict[str, Any]:
    """Train on this process's ranks; results in pieces that `together` joins."""
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    context = ParallelContext.create(ParallelLayout(world_size=world, pipeline=run.pipeline))
    engine = build_engine(run, context)
    results = [engine.train_step(batch_of(step, context, run.micro_num), 1e-2) for step in range(run.steps)]
    engine.optimizer.finish_gathering()
    gradients = [
        (name, tuple(parameter.shape), box.global_slices(), piece.clone())
        for name, parameter, pieces in engine.optimizer.sharded_gradients()  # type: ignore[attr-defined]
        for box, piece in pieces
    ]
    weights = {name: p.detach().clone() for chunk in engine.chunks for name, p in chunk.named_parameters()}
    sums = TokenSums(num_types=1)
    for micro in batch_of(run.steps, context, run.micro_num).micro_batches:
        engine.evaluate(micro, sums)
    evaluation = evaluation_results("set", sums, engine.sum_over_tokens)
    context.close()
    return {
        "losses": [float(result.loss) for result in results],
        "norms": [float(result.grad_norm) for result in results],
        "valid_tokens": [float(result.num_valid_tokens) for result in results],
        "statistics": {name: float(value) for name, value in results[-1].statistics.items()},
        "evaluation": evaluation,
        "gradients": gradients,
        "weights": weights,
    }


def together(parts: Sequence[dict[str, Any]]) -> Results:
    """The results of all ranks as one; what every rank must know is checked to be equal."""
    shared = ("losses", "norms", "valid_tokens", "statistics", "evaluation")
    for part in parts:
        assert all(part[key] == parts[0][key] for key in shared)
    gradients: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for part in parts:
        for name, shape, slices, piece in part["gradients"]:
            gradients.setdefault(name, torch.full(shape, float("nan")))[slices] = piece
        for name, weight in part["weights"].items():
            assert torch.equal(weights.setdefault(name, weight), weight), name
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    return Results(**{key: parts[0][key] for key in shared}, gradients=gradients, weights=weights)
