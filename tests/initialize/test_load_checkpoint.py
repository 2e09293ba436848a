"""What a run starts from: placeholders, paths that are not there, and a folder that it does not save to."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from helpers.commands import write_config
from torch import Tensor

from internlm.config.loader import load_config
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.hooks import Hook
from internlm.core.trainer import Trainer
from internlm.initialize import load_checkpoint
from internlm.initialize.build import build_layout, build_trainer
from internlm.utils.errors import CheckpointError


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.LogCaptureFixture]:
    monkeypatch.setattr(logging.getLogger("internlm"), "propagate", True)
    with caplog.at_level(logging.INFO, "internlm"):
        yield caplog


def new(folder: Path, **changes: Any) -> tuple[Trainer, list[str]]:
    """A trainer of the tiny config, and the notices of the config; `changes` are keys with `__` for a dot."""
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in {"data__total_steps": 2, **changes}.items()]
    loaded = load_config(write_config(folder), overrides)
    context = ParallelContext.create(build_layout(loaded.config, 1))
    return build_trainer(loaded.config, context, folder / "run"), loaded.notices


@pytest.mark.parametrize("path", ["local:llm_ckpts/xxxx", "{folder}/XXX", "boto3:s3://model_weights/XXX/7B"])
def test_a_placeholder_is_told_and_passed_over(tmp_path: Path, told: pytest.LogCaptureFixture, path: str) -> None:
    path = path.replace("{folder}", str(tmp_path))
    trainer, notices = new(tmp_path, ckpt__load_ckpt_info={"path": path, "content": ("model",)})
    assert trainer.state.step == 0
    assert (
        f"ckpt.load_ckpt_info.path = '{path}' is a placeholder: nothing is loaded, unless the folder exists" in notices
    )
    assert "starting from scratch" in told.text


@pytest.mark.parametrize("path", ["{folder}/nowhere", "{folder}/xx", "{folder}/max_xxx"])
def test_a_real_path_that_is_not_there_is_an_error(tmp_path: Path, path: str) -> None:
    path = path.replace("{folder}", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"there is no checkpoint at .* the path does not exist"):
        new(tmp_path, ckpt__load_ckpt_info={"path": path})


def test_the_folder_of_a_run_is_answered_with_that_of_its_checkpoints(tmp_path: Path) -> None:
    trainer, _ = new(tmp_path, ckpt__save_ckpt_folder=f"{tmp_path}/run/checkpoints")
    trainer.fit()
    (tmp_path / "run" / "logs").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    with pytest.raises(CheckpointError, match=r"such as 100/; there are some in '[^']*/run/checkpoints'$"):
        new(tmp_path, ckpt__load_ckpt_info={"path": f"{tmp_path}/run"})


def test_a_folder_that_is_named_like_a_placeholder_is_loaded(tmp_path: Path, told: pytest.LogCaptureFixture) -> None:
    trainer, _ = new(tmp_path, ckpt__save_ckpt_folder=f"{tmp_path}/xxxx")
    trainer.fit()
    trainer, _ = new(tmp_path, ckpt__load_ckpt_info={"path": f"{tmp_path}/xxxx", "content": ("all",)})
    assert trainer.state.step == 2


def test_a_run_that_does_not_save_does_not_resume(tmp_path: Path, told: pytest.LogCaptureFixture) -> None:
    trainer, _ = new(tmp_path)
    trainer.fit()
    trainer, notices = new(tmp_path, ckpt__enable_save_ckpt=False, ckpt__auto_resume=True)
    assert trainer.state.step == 0
    assert any(
        notice.startswith("no effect: ckpt.auto_resume = True (ckpt.enable_save_ckpt = False: ") for notice in notices
    )
    assert "starting from scratch (enable_save_ckpt is off)" in told.text


class Listener(Hook):
    """Notes what was loaded."""

    name = "listener"
    heard: ClassVar[list[str]] = []

    def on_checkpoint_loaded(self, trainer: Any, path: Any) -> None:
        self.heard.append(path.name)


class OwnWeights:
    """A `WeightSource` of a model's own weights."""

    def __init__(self, model: Any) -> None:
        self.tensors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


def test_hooks_hear_of_weights_in_another_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_checkpoint, "open_weights", lambda kind, path, model: OwnWeights(model))
    monkeypatch.setattr(load_checkpoint, "check_foreign_weights", lambda *args: None)
    monkeypatch.setattr(Listener, "heard", [])
    (tmp_path / "weights").mkdir()
    info = {"path": f"{tmp_path}/weights", "content": ("model",), "ckpt_type": "hf"}
    new(tmp_path, ckpt__load_ckpt_info=info, hooks=[f"{__name__}.Listener"])
    assert Listener.heard == ["weights"]
