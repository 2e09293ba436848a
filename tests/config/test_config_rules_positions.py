"""Samples that are longer than the positions of the model are meant for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.configs import small_config

from internlm.config.loader import LoadedConfig, load_config
from internlm.config.rules import find_problems
from internlm.utils.errors import ConfigError

LONG = {"data.seq_len": 4096, "model.max_position_embeddings": 512}


def yarn(**more: Any) -> dict[str, Any]:
    return {"model.rope_scaling": {"type": "yarn", **more}}


@pytest.mark.parametrize(
    "changes, texts",
    [
        (LONG, ["factor=8, original_max_position_embeddings=512", "set model.max_position_embeddings = 4096"]),
        (
            {**LONG, "model.max_position_embeddings": 4095},
            ["data.seq_len = 4096", "model.max_position_embeddings = 4095"],
        ),
        ({**LONG, "model.max_position_embeddings": 4096}, []),
        # Without the key, the model is meant for the length it is trained at.
        ({"data.seq_len": 4096}, []),
        ({**LONG, **yarn(factor=4)}, ["to which model.rope_scaling extends 512", "model.rope_scaling.factor = 8"]),
        ({**LONG, **yarn(factor=8)}, []),
        ({**LONG, **yarn(factor=8, original_max_position_embeddings=256)}, ["2048 tokens", "factor = 16"]),
        ({"data.seq_len": 4096, **yarn(factor=8, original_max_position_embeddings=512)}, []),
        ({"data.seq_len": 8, **yarn(factor=8)}, ["give model.rope_scaling.original_max_position_embeddings"]),
        # Dynamic scaling is for any length.
        ({**LONG, "model.rope_scaling": {"type": "dynamic", "factor": 1}}, []),
        ({**LONG, "model.use_dynamic_ntk_rope": True}, []),
        # Llama 3.1: its length is twice the product.
        (
            {
                "data.seq_len": 131072,
                "model.max_position_embeddings": 131072,
                "model.rope_scaling": {"type": "llama3", "factor": 8, "original_max_position_embeddings": 8192},
            },
            [],
        ),
        (
            {
                "data.seq_len": 32768,
                "model.max_position_embeddings": 32768,
                "model.rope_scaling": {"type": "linear", "factor": 8, "original_max_position_embeddings": 2048},
            },
            ["extends 2048", "factor = 16"],
        ),
    ],
)
def test_lengths(changes: dict[str, Any], texts: list[str]) -> None:
    found = [problem.text for problem in find_problems(small_config(changes), 1)]
    assert len(found) == bool(texts), found
    assert all(text in found[0] for text in texts), found


@pytest.mark.parametrize(
    "changes, length",
    [
        ({}, 2048),
        ({"data.seq_len": 4096}, 4096),
        ({"data.seq_len": 4096, "model.use_dynamic_ntk_rope": True}, 2048),
        ({"data.seq_len": 16, "model.max_position_embeddings": 64}, 64),
    ],
)
def test_the_length_of_the_model_without_a_key(changes: dict[str, Any], length: int) -> None:
    assert small_config(changes).model.max_position_embeddings == length


@pytest.fixture
def load(tmp_path: Path) -> Callable[[str], LoadedConfig]:
    def load(model: str) -> LoadedConfig:
        path = tmp_path / "config.py"
        path.write_text(
            "data = dict(seq_len=4096, micro_bsz=1, total_steps=1)\nckpt = dict(enable_save_ckpt=False)\n"
            f"model = dict(vocab_size=64, hidden_size=32, num_layers=1, num_attention_heads=4, {model})\n"
        )
        return load_config(path)

    return load


def test_a_config_of_internevo_keeps_working(load: Callable[[str], LoadedConfig]) -> None:
    """InternEvo does not compare the two keys: such a config gets a notice."""
    loaded = load("max_position_embeddings=2048, parallel_output=True")
    (notice,) = [line for line in loaded.notices if "data.seq_len" in line]
    assert "data.seq_len = 4096 is longer than model.max_position_embeddings = 2048" in notice
    assert not any("data.seq_len" in line for line in load("parallel_output=True").notices)
    with pytest.raises(ConfigError, match=r"config\.py:1: data.seq_len = 4096 is longer than model.max_position"):
        load("max_position_embeddings=2048")
