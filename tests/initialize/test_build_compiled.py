"""`model.compile` in a run: its numbers are those of a plain one, it evaluates, and it resumes bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import metrics_of, write_config
from helpers.runs import assert_same_bits, weights_of

from internlm.config.loader import load_config
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.trainer import Trainer
from internlm.initialize import stages
from internlm.initialize.build import build_layout, build_trainer
from internlm.utils.errors import ConfigError

STEPS = 4


def new(folder: Path, *, compiled: bool, saved: str = "a", steps: int = STEPS) -> Trainer:
    overrides = [
        f"model.compile={compiled}",
        f"data.total_steps={steps}",
        f"ckpt.checkpoint_every={STEPS // 2}",
        f"ckpt.save_ckpt_folder={folder / saved}",
    ]
    loaded = load_config(write_config(folder), overrides, world_size=1)
    context = ParallelContext.create(build_layout(loaded.config, 1))
    return build_trainer(loaded.config, context, folder / f"run_{saved}_{steps}")


@pytest.fixture(scope="module", autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def test_numbers_and_resuming(tmp_path: Path) -> None:
    plain = new(tmp_path, compiled=False, saved="plain")
    plain.fit()
    straight = new(tmp_path, compiled=True, saved="straight")
    assert is_compiled(straight) and not is_compiled(plain)
    straight.fit()
    losses = [column(trainer.run_dir, "loss") for trainer in (plain, straight)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    micro = next(iter(new(tmp_path, compiled=False, saved="fresh").train_loader)).micro_batches[0]
    sums = []
    for trainer in (plain, straight):
        sums.append(Sums())
        trainer.engine.evaluate(micro, sums[-1])
    assert sums[0].total == pytest.approx(sums[1].total, rel=1e-5)

    new(tmp_path, compiled=True, saved="parts", steps=STEPS // 2).fit()
    resumed = new(tmp_path, compiled=True, saved="parts")
    assert resumed.state.step == STEPS // 2
    resumed.fit()
    assert column(resumed.run_dir, "loss") == losses[1][STEPS // 2 :]
    assert_same_bits(weights_of(resumed.engine.model), weights_of(straight.engine.model))


class Sums:
    """Adds up the losses of tokens."""

    def __init__(self) -> None:
        self.total = 0.0

    def update(self, token_losses: torch.Tensor, *_: Any) -> None:
        self.total += float(token_losses.sum())


def is_compiled(trainer: Trainer) -> bool:
    return hasattr(trainer.engine.model.layers["0"].forward, "_torchdynamo_orig_callable")  # type: ignore[index]


def column(run_dir: Path, key: str) -> list[Any]:
    return [line[key] for line in metrics_of(run_dir)]


def test_what_cannot_be_compiled_here_is_told_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(device: torch.device) -> None:
        raise ConfigError("model.compile = True: no compiler")

    monkeypatch.setattr(stages, "check_compiler", refuse)
    with pytest.raises(ConfigError, match="no compiler"):
        new(tmp_path, compiled=True)
