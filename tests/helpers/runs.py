"""Whole training runs of the tiny model without a config file, for tests of the loop, hooks and checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from helpers.tiny import global_batch, tiny_engine, tiny_model
from internlm.checkpoint.hook import CheckpointHook
from internlm.checkpoint.manager import CheckpointManager
from internlm.checkpoint.save_folder import find_checkpoints
from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.hooks import Hook
from internlm.core.parallel.fsdp import apply_fsdp, local_tensor, reshard
from internlm.core.parallel.shard_spec import shard_spec_of
from internlm.core.step_metrics import StepMetrics
from internlm.core.trainer import Trainer
from internlm.data.batch import Batch
from internlm.solver.grad_scaler import DynamicGradScaler, GradScaler
from internlm.solver.optimizer.rules.adamw import AdamW
from internlm.solver.optimizer.rules.update_rule import UpdateRule
from internlm.solver.optimizer.state_form import FP32_STATE, StateForm
from internlm.utils.storage import storage_path


class Source:
    """The train data of the tiny model, with a cursor."""

    def __init__(self, context: ParallelContext) -> None:
        self.context = context
        self.step = 0

    def seek(self, step: int, num_consumed_samples: int) -> None:
        """Batches hold 4 samples, so both counters say the same."""
        assert num_consumed_samples == 4 * step
        self.step = step

    def __iter__(self) -> Iterator[Batch]:
        while True:
            # Randomness in the loop: a resumed run must go on with the same random numbers.
            torch.rand(())
            yield global_batch(self.step, 4, self.context.index("data"), self.context.size("data"))
            self.step += 1


class Record(Hook):
    """Keeps the numbers of every step, and a random number after each."""

    name = "record"

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.random: list[float] = []

    def on_step_end(self, trainer: Any, metrics: StepMetrics) -> None:
        self.losses.append(float(metrics.loss))
        self.norms.append(float(metrics.grad_norm))
        self.random.append(float(torch.rand(())))


def new_trainer(
    save_folder: Path | str | None,
    total_steps: int,
    *,
    dtype: str = "torch.float32",
    zero: int = -1,
    every: int = 5,
    hooks: Sequence[Hook] = (),
    seed: int = 7,
    fsdp: bool = False,
    form: StateForm = FP32_STATE,
    rule: UpdateRule | None = None,
    **changes: Any,
) -> Trainer:
    """A trainer of the tiny model on this process's ranks."""
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    context = ParallelContext.create(ParallelLayout(world_size=world, zero=zero))
    scaler: GradScaler | None = None
    if dtype == "torch.float16":
        scaler = DynamicGradScaler(
            initial_scale=2.0**12,
            min_scale=1.0,
            max_scale=2.0**20,
            growth_factor=2.0,
            backoff_factor=0.5,
            growth_interval=3,
            hysteresis=2,
        )
    model = tiny_model(context, dtype=dtype, seed=seed, **changes)
    engine = tiny_engine(
        context,
        scaler,
        apply_fsdp(model, context) if fsdp else model,
        weight_decay=0.1,
        clip_grad_norm=0.5,
        reduce_bucket_size=3000,
        form=form,
        rule=rule or AdamW(),
    )
    manager = CheckpointManager(save_folder) if save_folder else None
    return Trainer(
        engine,
        Source(context),
        total_steps=total_steps,
        lr=lambda step: 3e-3 / (1 + step),
        schedules=None if rule else {"beta2": lambda step: max(0.9, 1 - (step + 1) ** -0.8)},
        hooks=[*hooks, *([CheckpointHook(every)] if manager else [])],
        run_dir="unused",
        checkpointer=manager,
    )


def train(
    save_folder: Path | str | None, total_steps: int, resume_from: Path | str | None = None, **kwargs: Any
) -> dict[str, Any]:
    """Run to `total_steps`, perhaps from a checkpoint; returns losses, norms, random numbers and weights."""
    torch.manual_seed(99)
    record = Record()
    trainer = new_trainer(save_folder, total_steps, hooks=[record], **kwargs)
    if resume_from is not None:
        assert trainer.checkpointer is not None
        trainer.checkpointer.load(trainer, resume_from)  # type: ignore[attr-defined]
    trainer.fit()
    trainer.engine.optimizer.finish_gathering()
    return {
        "losses": record.losses,
        "norms": record.norms,
        "random": record.random,
        "state": trainer.state,
        "weights": weights_of(trainer.engine.model),
        "skipped": float(trainer.num_skipped_updates),
    }


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every parameter by name; whole, and collective, under FSDP."""
    reshard(model)
    return {name: _whole(parameter) for name, parameter in model.named_parameters()}


def _whole(parameter: nn.Parameter) -> torch.Tensor:
    local, spec = local_tensor(parameter), shard_spec_of(parameter)
    if spec.is_whole:
        return local.clone()
    on_all_ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(on_all_ranks, [(box, local[box.local_slices()].clone()) for box in spec.boxes])
    whole = local.new_full(spec.global_shape, torch.nan)
    for box, piece in (part for parts in on_all_ranks for part in parts):
        whole[box.global_slices()] = piece
    return whole


def steps_in(save_folder: Path | str) -> list[int]:
    """Steps of the complete checkpoints in a folder, ascending; snapshots too."""
    return [found.step for found in find_checkpoints(storage_path(save_folder))]


def assert_same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Two sets of tensors are equal bit for bit."""
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
