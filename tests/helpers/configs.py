"""A small config, and changes to it by dotted path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from internlm.config.schema import Config

BASE: dict[str, dict[str, Any]] = {
    "data": {"seq_len": 16, "micro_bsz": 2, "micro_num": 8, "total_steps": 10},
    "model": {"vocab_size": 64, "hidden_size": 32, "num_layers": 4, "num_attention_heads": 4},
    "ckpt": {"enable_save_ckpt": False},
}


def small_config(changes: Mapping[str, Any]) -> Config:
    """The small config with the values of `changes` (dotted path -> value)."""
    tree: dict[str, Any] = {name: dict(section) for name, section in BASE.items()}
    for path, value in changes.items():
        *outer, name = path.split(".")
        place = tree
        for part in outer:
            place = place.setdefault(part, {})
        place[name] = value
    return Config.model_validate(tree)
