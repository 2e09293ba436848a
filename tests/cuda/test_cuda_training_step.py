"""A training step on a GPU, against the same step on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.configs import small_config

from internlm.core.context.parallel_context import ParallelContext
from internlm.core.hooks import Hook
from internlm.initialize.build import build_layout, build_trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Numbers(Hook):
    """Keeps what the steps told."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []

    def on_step_end(self, trainer: Any, metrics: Any) -> None:
        self.steps.append((float(metrics.loss), float(metrics.grad_norm)))


def train(folder: Path, device: str, dtype: str) -> list[tuple[float, float]]:
    config = small_config({"model.dtype": dtype, "data.micro_num": 2, "data.total_steps": 4, "data.num_worker": 0})
    trainer = build_trainer(config, ParallelContext.create(build_layout(config, 1), device), folder)
    trainer.hooks.append(numbers := Numbers())
    trainer.fit()
    return numbers.steps


@pytest.mark.parametrize(("dtype", "tolerance"), [("torch.float32", 1e-4), ("torch.bfloat16", 2e-2)])
def test_the_losses_are_those_of_the_cpu(tmp_path: Path, dtype: str, tolerance: float) -> None:
    """Four steps add up roundings of sums in another order (2^-24 and 2^-8 each, over some hundred terms)."""
    gpu, cpu = train(tmp_path / "gpu", "cuda", dtype), train(tmp_path / "cpu", "cpu", dtype)
    torch.testing.assert_close(torch.tensor(gpu), torch.tensor(cpu), rtol=tolerance, atol=0)


def test_dense_rows_train_too(tmp_path: Path) -> None:
    changes = {
        "model.dtype": "torch.bfloat16",
        "data.micro_num": 2,
        "data.num_worker": 0,
        "data.use_packed_dataset": False,
    }
    config = small_config(changes)
    trainer = build_trainer(config, ParallelContext.create(build_layout(config, 1), "cuda"), tmp_path)
    trainer.hooks.append(numbers := Numbers())
    trainer.fit()
    assert len(numbers.steps) == 10 and numbers.steps[-1][0] < numbers.steps[0][0]
