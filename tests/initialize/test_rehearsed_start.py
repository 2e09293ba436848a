"""What the start of a run refuses about checkpoints, `--dry-run` refuses too, and it changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.commands import write_config

from internlm.checkpoint.manifest import Manifest
from internlm.checkpoint.save_folder import begin_writing, finish_writing
from internlm.cli import main
from internlm.config.loader import load_config
from internlm.utils.storage import storage_path


def saved_by_this_config(config: Path, folder: Path, contents: tuple[str, ...] = ("model", "scheduler")) -> None:
    """A complete checkpoint of step 5, as far as one looks at it without its tensors."""
    final = storage_path(folder / "5")
    writing = begin_writing(final, "test", 5)
    values = load_config(config).config.model_dump(mode="json")
    (writing / "config.json").write_text(json.dumps(values))
    finish_writing(writing, final, Manifest(5, contents, {}, 0.0))


def internevo(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in ("model_tp0_pp0.pt", "context.pt", f"{folder.name}.step"):
        (folder / name).write_text("")


@pytest.fixture
def dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = write_config(tmp_path)

    def call(code: int, *overrides: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        arguments = ["train", "--config", str(config), "--dry-run", *(f"--set={one}" for one in overrides)]
        assert main(arguments) == code
        assert sorted(tmp_path.rglob("*")) == before
        captured = capsys.readouterr()
        return captured.err if code else captured.out

    return call


@pytest.mark.parametrize("step", [3, 30])
def test_a_checkpoint_of_internevo_in_the_save_folder(tmp_path: Path, dry_run, step: int) -> None:
    internevo(tmp_path / "checkpoints" / str(step))
    refused = dry_run(2)
    assert refused.count(f"'{tmp_path}/checkpoints/{step}' is a checkpoint of InternEvo: convert it") == 1
    if step == 3:
        refused = dry_run(2, "ckpt.auto_resume=False")
        assert "this run saves its steps 1 to 10" in refused and "would overwrite" in refused
    else:
        assert "the config is valid" in dry_run(0, "ckpt.auto_resume=False")


def test_steps_that_are_behind_a_resumed_run_are_not_in_its_way(tmp_path: Path, dry_run) -> None:
    saved_by_this_config(tmp_path / "config.py", tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "3").mkdir()
    (tmp_path / "checkpoints" / "3" / "notes").write_text("mine")
    assert f"the run would resume from '{tmp_path}/checkpoints/5'" in dry_run(0)
    assert f"'{tmp_path}/checkpoints/3' has no manifest" in dry_run(2, "ckpt.auto_resume=False")


@pytest.mark.parametrize("resumes", [True, False])
def test_a_checkpoint_of_another_function(tmp_path: Path, dry_run, resumes: bool) -> None:
    folder = tmp_path / ("checkpoints" if resumes else "old")
    saved_by_this_config(tmp_path / "config.py", folder)
    load = [] if resumes else [f"ckpt.load_ckpt_info.path={folder}", "ckpt.load_ckpt_info.content=model"]
    assert "the run would" in dry_run(0, *load)
    assert "model.rope_base: 10000.0 -> 500000.0" in dry_run(2, *load, "model.rope_base=500000")
    assert "is valid" in dry_run(0, *load, "model.rope_base=500000", "ckpt.allow_model_changes=True")


def test_content_that_the_checkpoint_lacks(tmp_path: Path, dry_run) -> None:
    saved_by_this_config(tmp_path / "config.py", tmp_path / "old", ("model",))
    refused = dry_run(2, f"ckpt.load_ckpt_info.path={tmp_path}/old", "ckpt.load_ckpt_info.content=all")
    assert "contains only model, not optimizer, sampler, scheduler" in refused


def test_random_data_is_told(tmp_path: Path, dry_run) -> None:
    assert (
        "notice: data.train_folder is None: the run trains on random tokens, which only serves to measure speed"
        in dry_run(0)
    )
