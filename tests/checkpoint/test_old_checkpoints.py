"""Checkpoints of earlier versions are read: their config.json has some keys under earlier names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.configs import small_config

from internlm.checkpoint.inspect import changed_values, config_of
from internlm.checkpoint.manifest import Manifest
from internlm.checkpoint.reading import CONFIG_FILE, read_config
from internlm.config.compare import changes_between
from internlm.config.schema import Config
from internlm.initialize.model_changes import saved_config
from internlm.utils.storage import StoragePath, storage_path

EARLIER_NAMES = {"checkpoint_save_policy": "checkpoint_keep", "cpu_gemm": "cpu_products"}
"""Key of `model` -> its name in checkpoints of earlier versions."""


@pytest.fixture
def config() -> Config:
    return small_config({"model.checkpoint": 1.0, "model.checkpoint_save_policy": "matmuls", "model.cpu_gemm": "fp32"})


@pytest.fixture
def folders(config: Config, tmp_path: Path) -> Iterator[tuple[StoragePath, StoragePath]]:
    """The same config as an earlier and as this version writes it."""
    values: dict[str, Any] = config.model_dump(mode="json")
    model = {EARLIER_NAMES.get(name, name): value for name, value in values["model"].items()}
    paths = []
    for name, content in (("old", {**values, "model": model}), ("new", values)):
        (tmp_path / name).mkdir()
        (tmp_path / name / CONFIG_FILE).write_text(json.dumps(content))
        paths.append(storage_path(tmp_path / name))
    yield paths[0], paths[1]


def test_earlier_names_are_current_ones(config: Config, folders: tuple[StoragePath, StoragePath]) -> None:
    old, _ = folders
    assert "checkpoint_keep" in (old / CONFIG_FILE).read_text()
    saved = saved_config(old)
    assert saved is not None
    for found in (saved, read_config(old)):
        assert found.model.checkpoint_save_policy == "matmuls"
        assert found.model.cpu_gemm == "fp32"
        # As it would be read from a checkpoint: lists for tuples.
        assert changes_between(found, Config.model_validate(json.loads(config.model_dump_json()))) == []


def test_an_earlier_name_is_no_difference(folders: tuple[StoragePath, StoragePath]) -> None:
    manifest = Manifest(1, ("model",), {})
    old, new = (config_of(path, manifest) for path in folders)
    assert changed_values(old, new) == []
