"""`run.json` has what a run was started with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.commands import start_training, write_config

from internlm.config.loader import load_config
from internlm.monitor.run_file import FILE_NAME, StartedRun, read_run_file, write_run_file
from internlm.utils.errors import DataError


def test_a_config_is_read_as_it_was_written(tmp_path: Path) -> None:
    config = load_config(Path(__file__).parents[2] / "configs" / "70B_llama2.py", world_size=64).config
    write_run_file(tmp_path, StartedRun(config, 32))
    write_run_file(tmp_path, StartedRun(config, 64))
    assert read_run_file(tmp_path) == StartedRun(config, 64)
    assert [entry.name for entry in tmp_path.iterdir()] == [FILE_NAME]


def test_a_run_writes_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["--config", write_config(tmp_path), "--run-dir", run, "--set", "data.total_steps=1"]
    assert start_training(arguments, tmp_path / "output.txt").wait(60) == 0
    assert read_run_file(run).world_size == 1 and read_run_file(run).config.data.total_steps == 1


def test_a_run_goes_on_without_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / FILE_NAME).mkdir(parents=True)
    arguments = ["--config", write_config(tmp_path), "--run-dir", run, "--set", "data.total_steps=1"]
    process = start_training(arguments, tmp_path / "output.txt")
    assert process.wait(60) == 0
    assert "the page of this run will have no layout" in process.output and "done: 1 steps" in process.output
    assert not list(run.glob(f".{FILE_NAME}*"))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"config": 7}', '{"config": {"x": 1}, "world_size": 1}', "[" * 9999])
def test_a_broken_file_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_run_file(tmp_path)
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(DataError, match=rf"{FILE_NAME}' cannot be read"):
        read_run_file(tmp_path)
    (tmp_path / FILE_NAME).write_text(json.dumps({"config": {}, "world_size": "x"}))
    with pytest.raises(DataError, match=rf"{FILE_NAME}' cannot be read"):
        read_run_file(tmp_path)
