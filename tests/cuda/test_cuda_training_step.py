"""A training step on a GPU, against the same step on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.configs import small_config

from internlm.core.context.parallel_context import ParallelContext
from internlm.core.hooks import Hook
from internlm.core.trainer import Trainer
from internlm.initialize.build import build_layout, build_trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Numbers(Hook):
    """Keeps what the steps told."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []

    def on_step_end(self, trainer: Any, metrics: Any) -> None:
        self.steps.append((float(metrics.loss), float(metrics.grad_norm)))


def new_trainer(folder: Path, device: str, changes: dict[str, Any]) -> tuple[Trainer, Numbers]:
    config = small_config({"data.num_worker": 0, **changes})
    trainer = build_trainer(config, ParallelContext.create(build_layout(config, 1), device), folder / device)
    trainer.hooks.append(numbers := Numbers())
    return trainer, numbers


def losses_with_the_weights_of_the_cpu(folder: Path, device: str, changes: dict[str, Any]) -> tuple[Any, Any]:
    """(loss, gradient norm) of each step on the CPU, and on `device`, whose random numbers are others."""
    (cpu, on_cpu), (other, on_other) = (new_trainer(folder, where, changes) for where in ("cpu", device))
    with torch.no_grad():
        for mine, its in zip(cpu.engine.model.parameters(), other.engine.model.parameters(), strict=True):
            its.copy_(mine)
    other.engine.optimizer.reset_masters()
    cpu.fit()
    other.fit()
    return torch.tensor(on_cpu.steps), torch.tensor(on_other.steps)


@pytest.mark.parametrize(("dtype", "tolerance"), [("torch.float32", 1e-4), ("torch.bfloat16", 2e-2)])
@pytest.mark.parametrize("packed", [True, False])
def test_the_losses_are_those_of_the_cpu(tmp_path: Path, dtype: str, tolerance: float, packed: bool) -> None:
    """Five roundings of bf16 (2^-8) for a sum of losses and a norm of gradients that pass four layers, twice each; in
    fp32 as many are 3e-7, and four steps of AdamW, which divides small gradients by their size, magnify them."""
    changes = {
        "model.dtype": dtype,
        "data.micro_num": 2,
        "data.total_steps": 4,
        "data.use_packed_dataset": packed,
        "data.fixed_random_dataset_seqlen": False,
    }
    on_cpu, on_gpu = losses_with_the_weights_of_the_cpu(tmp_path, "cuda", changes)
    torch.testing.assert_close(on_gpu, on_cpu, rtol=tolerance, atol=0)
