"""Runs a case, saves, and goes on: without a break, from its own checkpoint, and from that of one process."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Before any fork.
import internlm.verify.warm_up  # noqa: F401
from helpers.ranks import RankPool
from internlm.checkpoint.manager import CheckpointManager
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.context.random import seed_everything
from internlm.core.parallel.fsdp import local_tensor, reshard
from internlm.core.parallel.shard_spec import shard_spec_of
from internlm.core.trainer import Trainer
from internlm.solver.optimizer.hybrid_zero import HybridZeroOptimizer
from internlm.utils.storage import StoragePath
from internlm.verify.case import Case, Combination, changed
from internlm.verify.record import RankRecord, Record, TensorBox, boxes_of, join, join_ranks
from internlm.verify.report import Verdict, judge
from internlm.verify.run import CaseRun, start_case

SAVED_STEP, LAST_STEP = 1, 2
"""The step after the resume takes weights, masters, moments, counters and the place in the data as they were saved."""

Ranks = Callable[[int], RankPool]


def save(manager: CheckpointManager, trainer: Trainer) -> StoragePath:
    """A complete checkpoint of this instant."""
    assert manager.save_folder is not None
    manager.save(trainer)
    manager.finish()  # raises when the save has failed
    return manager.save_folder / str(trainer.state.step)


# -- what is in a checkpoint -------------------------------------------------------------------------------------------


def optimizer_of(trainer: Trainer) -> HybridZeroOptimizer:
    """The optimizer by the type that it has."""
    assert isinstance(trainer.engine.optimizer, HybridZeroOptimizer)
    return trainer.engine.optimizer


def tensors_of(trainer: Trainer) -> list[TensorBox]:
    """This rank's boxes of all weights, masters and moments."""
    optimizer = optimizer_of(trainer)
    optimizer.finish_gathering()
    pieces: list[TensorBox] = []
    for chunk in trainer.engine.chunks:
        reshard(chunk)
        for parameter in chunk.parameters():
            spec, local = shard_spec_of(parameter), local_tensor(parameter)
            pieces += boxes_of(spec, ((box, local[box.local_slices()]) for box in spec.boxes))
    for key, parameter, boxes in optimizer.sharded_state():
        pieces += (replace(piece, name=key) for piece in boxes_of(shard_spec_of(parameter), boxes))
    return pieces


def draw() -> list[float]:
    """A number of every generator of this process."""
    return [random.random(), np.random.random(), float(torch.rand(()))]


def state_of(trainer: Trainer) -> dict[str, Any]:
    """All that a run goes on from, on this rank."""
    optimizer = optimizer_of(trainer)
    state: dict[str, Any] = {f"{piece.name} at {piece.offset}": piece.values for piece in tensors_of(trainer)}
    for chunk in trainer.engine.chunks:
        # Also the padding, which is in no box.
        for name, parameter in chunk.named_parameters():
            state[f"whole local {name}"] = local_tensor(parameter).detach().float().numpy().copy()
    state["counters"] = asdict(trainer.state)
    state["number of updates"] = optimizer.num_updates
    state["number of skipped updates"] = float(trainer.num_skipped_updates)
    state["loss scale"] = optimizer.scaler.state_dict()
    state["random numbers"] = draw()
    return state


def steps_of(record: RankRecord, first: int = 0) -> dict[str, Any]:
    """What this rank saw of the steps from `first` on."""
    seen: dict[str, Any] = {}
    for number, step in enumerate(record.steps[first:]):
        seen |= {f"{number}: loss": step.loss, f"{number}: gradient norm": step.grad_norm}
        for kind, pieces in (("gradient", step.gradients), ("weight", step.weights)):
            seen |= {f"{number}: {kind} {piece.name} at {piece.offset}": piece.values for piece in pieces}
    return seen


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """The names of what is not the same, bit for bit."""
    names = found.keys() & expected.keys()
    return sorted(found.keys() ^ expected.keys()) + [name for name in names if not _same(found[name], expected[name])]


def _same(one: Any, other: Any) -> bool:
    return one.tobytes() == other.tobytes() if isinstance(one, np.ndarray) else one == other


# -- one row of the matrix ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RankResults:
    """What one rank tells of `leave_and_resume`.

    Attributes:
        straight: all steps, without a break.
        differences: between going on, and going on from the run's own checkpoint.
        saved: this rank's boxes of what the run saved.
        from_one_process: the steps after the checkpoint of one process.
    """

    straight: RankRecord
    differences: list[str]
    saved: list[TensorBox]
    from_one_process: RankRecord


@dataclass(frozen=True)
class Row:
    """A row of the matrix, run with a save in its middle.

    Attributes:
        straight: all steps without a break, against one process.
        resumed: what differs in any bit, by rank, when it goes on from its own checkpoint.
        loaded: which tensors of its checkpoint differ in any bit when one process has loaded them.
        from_one_process: the steps after a checkpoint of one process, against those of that process; it starts from
            the same bits.
    """

    straight: Verdict
    resumed: list[list[str]]
    loaded: list[str]
    from_one_process: Verdict


def run_row(combination: Combination, ranks: Ranks, folder: Path) -> Row:
    """Run a row in all ways that `Row` tells of.

    Args:
        folder: an empty one for checkpoints.
    """
    case = combination.case()
    reference = case.reference()
    alone, own = str(folder / "alone"), str(folder / "own")
    expected = join_ranks(ranks(1).run(one_process, reference, alone))
    results = ranks(case.world_size).run(leave_and_resume, case, own, f"{alone}/{SAVED_STEP}")
    loaded = ranks(1).run(loaded_in_one_process, reference, f"{own}/{SAVED_STEP}")
    after_save = Record(expected.steps[SAVED_STEP - 1].weights, expected.steps[SAVED_STEP:], expected.placements)
    return Row(
        judge(case, join_ranks([result.straight for result in results]), expected),
        [result.differences for result in results],
        differences(join(loaded, "loaded", {}), join([result.saved for result in results], "saved", {})),
        judge(case, join_ranks([result.from_one_process for result in results]), after_save),
    )


def leave_and_resume(case: Case, folder: str, other: str) -> RankResults:
    """Save in the middle of a run; on each rank.

    Args:
        case: the run.
        folder: for the checkpoint.
        other: the checkpoint that one process saved at the same step.
    """
    context = start_case(case)
    manager = CheckpointManager(folder)
    straight = CaseRun(case, context)
    straight.train(SAVED_STEP)
    draw()
    saved, path = tensors_of(straight.trainer), save(manager, straight.trainer)
    straight.train(LAST_STEP)
    expected = steps_of(straight.record, SAVED_STEP) | state_of(straight.trainer)

    again = resumed(case, context, manager, path)
    again.train(LAST_STEP)
    found = differences(steps_of(again.record) | state_of(again.trainer), expected)

    from_one_process = resumed(case, context, manager, other)
    from_one_process.train(LAST_STEP)
    context.close()
    return RankResults(straight.record, found, saved, from_one_process.record)


def resumed(case: Case, context: ParallelContext, manager: CheckpointManager, path: StoragePath | str) -> CaseRun:
    """A fresh run that has loaded a checkpoint; its own weights and random numbers would be others."""
    other = replace(case, config=changed(case.config, {"seed": case.config.seed + 1}))
    seed_everything(other.config.seed)
    run = CaseRun(other, context)
    # The noise of routers is a function of the config's seed.
    run.trainer.engine.routing.seed = case.config.seed
    manager.load(run.trainer, path)
    run.recorder.restart()
    return run


def one_process(case: Case, folder: str) -> RankRecord:
    """The run in one process; its checkpoint is left in `folder`."""
    run = CaseRun(case, start_case(case))
    run.train(SAVED_STEP)
    save(CheckpointManager(folder), run.trainer)
    run.train(LAST_STEP)
    return run.record


def loaded_in_one_process(case: Case, path: str) -> list[TensorBox]:
    """All tensors of a checkpoint, after a model in one process has loaded them."""
    return tensors_of(resumed(case, start_case(case), CheckpointManager(None), path).trainer)
