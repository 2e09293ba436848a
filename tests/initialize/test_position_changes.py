"""Extending the context of a checkpoint: what is accepted, and what the log says of lengths."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import write_config
from helpers.hf_folders import save_native

from internlm.config.loader import load_config
from internlm.convert.from_hf import convert_from_hf
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.trainer import Trainer
from internlm.initialize.build import build_layout, build_trainer
from internlm.utils.errors import CheckpointError
from internlm.utils.storage import storage_path

PRETRAINED = 64
"""Length of the saved model: `max_position_embeddings` of the folders that `save_native` writes."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with a Llama of transformers in `hf/` and its import in `ours/0/`, and the keys of the model."""
    folder = tmp_path_factory.mktemp("pretrained")
    config = save_native("llama", folder / "hf").config
    convert_from_hf(storage_path(folder / "hf"), storage_path(folder / "ours"))
    keys = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_kv_attention_heads": config.num_key_value_heads,
        "layer_norm_epsilon": config.rms_norm_eps,
        "enable_qkv_fusion": False,
    }
    return folder, keys


@pytest.fixture(params=["hf", "internevo"])
def start(request: pytest.FixtureRequest, folders: Any, tmp_path: Path) -> Any:
    """Start a run from the folder of transformers, or from its import."""
    folder, keys = folders
    path = folder / ("hf" if request.param == "hf" else "ours/0")
    info = {"path": str(path), "content": ("model",), "ckpt_type": request.param}

    def start(seq_len: int, allowed: tuple[str, ...] = (), **model: Any) -> Trainer:
        overrides = ["model_type=LLAMA2", f"data.seq_len={seq_len}", f"ckpt.load_ckpt_info={info}"]
        overrides += [f"model.{key}={value}" for key, value in {**keys, **model}.items()]
        overrides.append(f"ckpt.allow_model_changes={allowed}")
        config = load_config(write_config(tmp_path), overrides).config
        return build_trainer(config, ParallelContext.create(build_layout(config, 1)), tmp_path / "run")

    return start


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.LogCaptureFixture]:
    monkeypatch.setattr(logging.getLogger("internlm"), "propagate", True)
    with caplog.at_level(logging.INFO, "internlm"):
        yield caplog


def about_lengths(told: pytest.LogCaptureFixture) -> list[str]:
    return [text for text in told.messages if "tokens" in text and ("extend" in text or "longer" in text)]


@pytest.mark.parametrize("kind", ["yarn", "llama3", "linear", "dynamic"])
def test_an_extension_is_accepted_by_its_key_alone(start: Any, told: pytest.LogCaptureFixture, kind: str) -> None:
    scaling = {"type": kind, "factor": 4.0, "original_max_position_embeddings": PRETRAINED}
    length = PRETRAINED if kind == "dynamic" else 4 * PRETRAINED
    keys = {"rope_scaling": scaling, "max_position_embeddings": length}
    with pytest.raises(CheckpointError, match=r"set ckpt.allow_model_changes = \('model.rope_scaling',\)"):
        start(256, **keys)
    with pytest.raises(CheckpointError, match=r"model.layer_norm_epsilon"):
        start(256, ("model.rope_scaling",), **{**keys, "layer_norm_epsilon": 1e-3})
    told.clear()
    start(256, ("model.rope_scaling",), **keys)
    (line,) = about_lengths(told)
    assert f"is extended from 64 to {'any number of' if kind == 'dynamic' else 256} tokens" in line
    assert line.endswith(f"by model.rope_scaling = {kind}, factor 4")


def test_a_larger_base_extends(start: Any, told: pytest.LogCaptureFixture) -> None:
    start(256, ("model.rope_base",), rope_base=5e5, max_position_embeddings=256)
    (line,) = about_lengths(told)
    assert line.endswith("is extended from 64 to 256 tokens by model.rope_base = 500000.0")


def test_new_positions_without_scaling_are_a_warning(start: Any, told: pytest.LogCaptureFixture) -> None:
    start(256)
    (line,) = about_lengths(told)
    assert line.startswith("data.seq_len = 256 is longer than the 64 tokens for which ")
    told.clear()
    start(64)
    assert not about_lengths(told)


def test_another_length_of_pretraining_is_a_warning(start: Any, told: pytest.LogCaptureFixture) -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    start(256, ("model.rope_scaling",), rope_scaling=scaling)
    assert "model.rope_scaling.original_max_position_embeddings = 64" in about_lengths(told)[-1]
