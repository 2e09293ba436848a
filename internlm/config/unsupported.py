"""Refuses, by name, what the schema knows and this version cannot do yet; and says what has no effect.

Nothing is ever silently ignored: the schema declares the status of each key, this module acts on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from internlm.config.mistakes import Mistake
from internlm.config.schema import Config
from internlm.config.schema.base import Status, default_of, key_info, walk_values

LATER_FAMILIES = {
    "INTERNLM_MoE": "mixture of experts",
    "QWEN2MOE": "mixture of experts",
    "QWEN3MOE": "mixture of experts",
    "MIXTRALMOE": "mixture of experts",
    "LLAVA": "multimodal models",
    "hf": "training Hugging Face classes",
}
"""Model types that InternEvo registers and this version does not."""

_ONLY_WHILE_SAVING = (
    "oss_snapshot_freq",
    "keep_latest",
    "async_save",
    "async_upload",
    "enable_internevo2hf_ckpt",
)
"""Keys of `ckpt` that mean nothing while saving is off."""


def find_unsupported(config: Config) -> Iterator[Mistake]:
    """One mistake for each value that asks for a feature that is not there yet."""
    for path, field, value in walk_values(config):
        info = key_info(field)
        assert info is not None, path
        default = default_of(field)
        if info.status is not Status.LATER or value == default or value in info.accepts:
            continue
        yield Mistake((path,), f"{path} = {value!r}: {info.detail} is not yet supported; set it to {default!r}")
    if config.model_type in LATER_FAMILIES:
        feature = LATER_FAMILIES[config.model_type]
        yield Mistake(("model_type",), f"model_type = {config.model_type!r}: {feature} is not yet supported")


def find_ineffective(config: Config, given: Callable[[str], Any]) -> Iterator[str]:
    """One notice for each reason why values that were set change nothing.

    `given(path)` is the value that the user gave for a path, or None.
    """
    by_reason: dict[str, list[str]] = {}
    for path, field, value in walk_values(config):
        info = key_info(field)
        assert info is not None, path
        asked = given(path)
        if info.status is Status.NO_EFFECT and value != default_of(field):
            by_reason.setdefault(info.detail, []).append(f"{path} = {value!r}")
        elif info.forced and asked is not None and asked != value:
            yield f"{path} = {asked!r} is ignored: it is always {info.derived} = {value!r}"
    for reason, keys in by_reason.items():
        yield f"no effect: {', '.join(keys)} ({reason})"
    if not config.ckpt.enable_save_ckpt:
        fields = type(config.ckpt).model_fields
        idle = [name for name in _ONLY_WHILE_SAVING if getattr(config.ckpt, name) != default_of(fields[name])]
        if idle:
            yield f"no effect: {', '.join(f'ckpt.{name}' for name in idle)} (saving is off)"
