"""Carries out a case on the ranks of the current process group, with the parts that a training run uses."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from internlm.core.context.parallel_context import ParallelContext
from internlm.core.context.random import seed_everything
from internlm.core.engine import Engine
from internlm.core.parallel.fsdp import local_tensor, reshard
from internlm.core.parallel.shard_spec import shard_spec_of
from internlm.initialize.build import build_chunks, build_engine, build_layout, set_numerics
from internlm.solver.optimizer.hybrid_zero import HybridZeroOptimizer
from internlm.verify.batches import local_batch
from internlm.verify.case import Case
from internlm.verify.record import Piece, RankRecord, RankStep, describe_placement, pieces_of

DEFAULT_STEPS = 3
"""The first step shows gradients, the second that they were forgotten and the moments kept, the third that it lasts."""


def run_case(case: Case, steps: int = DEFAULT_STEPS) -> RankRecord:
    """Train `steps` steps and record what this rank sees. Collective over the `case.world_size` ranks of the job."""
    seed_everything(case.config.seed)
    set_numerics(case.config)
    context = ParallelContext.create(build_layout(case.config, case.world_size))
    record = _record(case, steps, context)
    # Not after a failure: to the other ranks, closed connections would come before its cause.
    context.close()
    return record


def _record(case: Case, steps: int, context: ParallelContext) -> RankRecord:
    config = case.config
    engine = build_engine(config, context, build_chunks(config, context), type_names=["all"])
    record = RankRecord(list(_weights(engine)), placements=_placements(engine, context))
    for step in range(steps):
        batch = local_batch(case, step, context.index("data"), context.size("data"))
        result = engine.train_step(batch, lr=config.adam.lr)
        engine.optimizer.finish_gathering()
        record.steps.append(
            RankStep(float(result.loss), float(result.grad_norm), list(_gradients(engine)), list(_weights(engine)))
        )
    return record


def _parameters(engine: Engine) -> Iterator[nn.Parameter]:
    for chunk in engine.chunks:
        reshard(chunk)
        yield from chunk.parameters()


def _weights(engine: Engine) -> Iterator[Piece]:
    for parameter in _parameters(engine):
        spec = shard_spec_of(parameter)
        local = local_tensor(parameter)
        yield from pieces_of(spec, ((box, local[box.local_slices()]) for box in spec.boxes))


def _gradients(engine: Engine) -> Iterator[Piece]:
    assert isinstance(engine.optimizer, HybridZeroOptimizer)
    for _, parameter, pieces in engine.optimizer.sharded_gradients():
        yield from pieces_of(shard_spec_of(parameter), pieces)


def _placements(engine: Engine, context: ParallelContext) -> dict[str, str]:
    specs = [shard_spec_of(parameter) for parameter in _parameters(engine)]
    return {spec.name: describe_placement(spec, context) for spec in specs}
