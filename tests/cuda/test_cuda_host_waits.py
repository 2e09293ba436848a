"""Steps that show nothing run with PyTorch's debug mode for synchronisation set to "error"."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.configs import small_config

from internlm.core.context.parallel_context import ParallelContext
from internlm.core.hooks import Hook
from internlm.initialize.build import build_layout, build_trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

STEPS = 8


@pytest.fixture(autouse=True)
def _default_mode() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


class ErrorsOnWaits(Hook):
    """From the start of the third step to the start of the last one a wait is an error."""

    def __init__(self) -> None:
        self.steps = 0

    def on_step_start(self, trainer: Any) -> None:
        is_steady = 2 <= trainer.state.step < STEPS - 1
        self.steps += is_steady
        torch.cuda.set_sync_debug_mode("error" if is_steady else "default")


def train(folder: Path, changes: dict[str, Any], *more: Hook) -> int:
    values = {
        "data.micro_num": 2,
        "data.total_steps": STEPS,
        "data.num_worker": 0,
        "model.dtype": "torch.bfloat16",
        "hybrid_zero_optimizer.clip_grad_norm": 1.0,
        "monitor.log_every": 100,
        **changes,
    }
    config = small_config(values)
    trainer = build_trainer(config, ParallelContext.create(build_layout(config, 1), torch.device("cuda", 0)), folder)
    trainer.hooks = [watch := ErrorsOnWaits(), *trainer.hooks, *more]
    trainer.fit()
    return watch.steps


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data.use_packed_dataset": False},
        {"data.fixed_random_dataset_seqlen": False},
        {"model.checkpoint": 1.0},
        {"model.dtype": "torch.float16"},
        {"model.dtype": "torch.float16", "lr_scheduler.advance": "update"},
        {"model.dtype": "torch.float32"},
        {"model.dtype": "torch.bfloat16", "float8.enable_float8_linear": True},
        {"model.dtype": "torch.bfloat16", "adam.moments_dtype": "torch.bfloat16"},
        {"model.dtype": "torch.bfloat16", "hybrid_zero_optimizer.grad_accumulation_dtype": "torch.bfloat16"},
        {"model.dtype": "torch.bfloat16", "model.checkpoint": 1.0, "model.checkpoint_save_policy": "attention"},
        {"parallel.tensor.mode": "isp"},
    ],
    ids=str,
)
def test_a_step_that_shows_nothing_waits_for_nothing(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert train(tmp_path, changes) == STEPS - 3
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))


def test_the_mode_sees_a_wait(tmp_path: Path) -> None:
    class Reads(Hook):
        def on_step_end(self, trainer: Any, metrics: Any) -> None:
            metrics.loss.item()

    with pytest.raises(RuntimeError, match="synchronizing"):
        train(tmp_path, {}, Reads())


def test_numbers_that_came_later_are_those_read_at_once(tmp_path: Path) -> None:
    class AtOnce(Hook):
        def __init__(self) -> None:
            self.losses: list[float] = []

        def on_step_end(self, trainer: Any, metrics: Any) -> None:
            self.losses.append(metrics.loss.clone())

    at_once = AtOnce()
    train(tmp_path, {}, at_once)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [float(loss) for loss in at_once.losses]
