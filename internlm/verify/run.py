"""Runs a case on the ranks of the current process group, with the components of a training run."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from internlm.core.context.parallel_context import ParallelContext
from internlm.core.context.random import seed_everything
from internlm.core.engine import Engine
from internlm.core.hooks import Hook, RunningTrainer
from internlm.core.parallel.fsdp import local_tensor, reshard
from internlm.core.parallel.shard_spec import shard_spec_of
from internlm.core.step_metrics import StepMetrics
from internlm.core.trainer import Trainer
from internlm.initialize.build import build_engine, build_layout, set_numerics
from internlm.initialize.build_hooks import routing_replays
from internlm.initialize.stages import build_chunks
from internlm.verify.batches import CaseBatches
from internlm.verify.case import Case
from internlm.verify.record import RankRecord, RankStep, TensorBox, boxes_of, describe_placement

DEFAULT_STEPS = 3
"""The first step tests gradients, the second that they are cleared and moments carried over, the third steady state."""


def run_case(case: Case, steps: int = DEFAULT_STEPS) -> RankRecord:
    """Train `steps` steps and record this rank's results; collective over the `case.world_size` ranks of the job."""
    context = start_case(case)
    run = CaseRun(case, context)
    run.train(steps)
    # Skipped after a failure: other ranks would see closed connections before the cause.
    context.close()
    return run.record


def start_case(case: Case) -> ParallelContext:
    """Seed this process as a rank of a case and create its context, which the caller closes."""
    seed_everything(case.config.seed)
    set_numerics(case.config)
    return ParallelContext.create(build_layout(case.config, case.world_size))


class CaseRun:
    """A newly built run of a case on this rank.

    Attributes:
        trainer: of the run.
        recorder: records the results of its steps.
    """

    def __init__(self, case: Case, context: ParallelContext) -> None:
        config = case.config
        engine = build_engine(config, context, build_chunks(config, context), type_names=["all"])
        self.trainer = Trainer(
            engine,
            CaseBatches(case, context.index("data"), context.size("data")),
            total_steps=0,
            lr=lambda step: config.adam.lr,
            hooks=routing_replays(config, engine),
        )
        self.recorder = Recorder(self.trainer)

    @property
    def record(self) -> RankRecord:
        """The results so far."""
        return self.recorder.record

    def train(self, until: int) -> None:
        """Train up to step `until`, counted from the start of the run."""
        self.trainer.total_steps = until
        self.trainer.fit()


class Recorder(Hook):
    """Hook that records this rank's results of each step.

    Attributes:
        record: results since construction, or since `restart`.
    """

    name = "recorder"

    def __init__(self, trainer: Trainer) -> None:
        self._engine = trainer.engine
        trainer.hooks.append(self)
        self.restart()

    def restart(self) -> None:
        """Start a new record, with the current weights as the initial ones."""
        self.record = RankRecord(list(_weights(self._engine)), placements=_placements(self._engine))

    def on_step_end(self, trainer: RunningTrainer, metrics: StepMetrics) -> None:
        engine = self._engine
        engine.optimizer.finish_gathering()
        # Whether the largest of nearly equal logits is the right one depends on rounding.
        is_exact = next(_parameters(engine)).dtype == torch.float64
        compared = ("moe/", "multi_token/" if is_exact else "multi_token/loss/")
        routing = {name: float(value) for name, value in metrics.extra.items() if name.startswith(compared)}
        loss, norm = float(metrics.loss), float(metrics.grad_norm)
        self.record.steps.append(RankStep(loss, norm, list(_gradients(engine)), list(_weights(engine)), routing))


def _parameters(engine: Engine) -> Iterator[nn.Parameter]:
    for chunk in engine.chunks:
        reshard(chunk)
        yield from chunk.parameters()


def _weights(engine: Engine) -> Iterator[TensorBox]:
    for parameter in _parameters(engine):
        spec = shard_spec_of(parameter)
        local = local_tensor(parameter)
        yield from boxes_of(spec, ((box, local[box.local_slices()]) for box in spec.boxes))


def _gradients(engine: Engine) -> Iterator[TensorBox]:
    for _, parameter, pieces in engine.optimizer.sharded_gradients():
        yield from boxes_of(shard_spec_of(parameter), pieces)


def _placements(engine: Engine) -> dict[str, str]:
    specs = [shard_spec_of(parameter) for parameter in _parameters(engine)]
    return {spec.name: describe_placement(spec, engine.context) for spec in specs}
