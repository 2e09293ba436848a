"""Refuses keys and values whose feature this version lacks, by the feature's name, and reports those without effect.

Nothing is ever silently ignored: the schema declares the status of each key, this module acts on it.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator
from typing import Any

from internlm.config.problem import Problem
from internlm.config.schema import Config
from internlm.config.schema.base import Status, default_of, key_info, walk_values

LATER_FAMILIES = {
    "CHAMELEON": "multimodal models",
    "LUMINA": "image generation",
    "DIT": "image generation",
    "InternLM3_M": "models of self- and cross-decoder layers",
    "INTERNLM_FROM_HF": "InternEvo's copy of a Hugging Face class (use model_type = 'hf' with hf.folder instead)",
}
"""Model types that InternEvo registers and this version does not."""

LATER_KEYS = {
    "model.num_self_decoder_layers": "models of self- and cross-decoder layers",
    "model.num_cross_decoder_layers": "models of self- and cross-decoder layers",
    "moe.[!r]*": "MegaBlocks (use model.num_experts instead)",
}
"""Patterns of InternEvo's keys for features that this version lacks altogether."""

_JUDGED_ELSEWHERE = (
    # The rules refuse a size above 1 in a dense model, and ask for 1.
    "parallel.expert.size",
    # Of a model in which no layer is recomputed: see `internlm.config.notices`.
    "model.checkpoint_save_policy",
    "selective_checkpoint",
    "selective_checkpoint_offload",
)
"""Keys that refine another key, and about which others report while that one has its default."""

_ONLY_WHILE_SAVING = (
    "oss_snapshot_freq",
    "keep_latest",
    "async_save",
    "async_upload",
    "enable_internevo2hf_ckpt",
)
"""Keys of `ckpt` without effect while saving is off."""


def find_unsupported(config: Config) -> Iterator[Problem]:
    """One problem for each value that needs a missing feature."""
    for path, field, value in walk_values(config):
        info = key_info(field)
        assert info is not None, path
        default = default_of(field)
        if info.status is not Status.LATER or value == default or value in info.accepts:
            continue
        yield Problem((path,), f"{path} = {value!r}: {info.detail} is not yet supported; set it to {default!r}")
    if config.model_type in LATER_FAMILIES:
        feature = LATER_FAMILIES[config.model_type]
        yield Problem(("model_type",), f"model_type = {config.model_type!r}: {feature} is not yet supported")


def feature_of(path: str) -> str | None:
    """The missing feature that an unknown key belongs to."""
    return next((feature for pattern, feature in LATER_KEYS.items() if fnmatch.fnmatchcase(path, pattern)), None)


def find_refused_in_training(config: Config) -> Iterator[Problem]:
    """One problem for each value that only works for users of the library."""
    for path, field, value in walk_values(config):
        info = key_info(field)
        assert info is not None, path
        if info.status is Status.LIBRARY_ONLY and value != default_of(field):
            yield Problem((path,), f"{path} = {value!r}: {info.detail}")


def find_ineffective(config: Config, given: Callable[[str], Any]) -> Iterator[str]:
    """One notice for each reason why values that were set change nothing.

    `given(path)` is the value that the user gave for a path, or None.
    """
    by_reason: dict[str, list[str]] = {}
    values = {path: (value, default_of(field)) for path, field, value in walk_values(config)}
    for path, field, value in walk_values(config):
        info = key_info(field)
        assert info is not None, path
        requested = given(path)
        if info.status is Status.NO_EFFECT and value != default_of(field):
            by_reason.setdefault(info.detail, []).append(f"{path} = {value!r}")
        elif info.status is Status.DEPENDENT and requested is not None and value != default_of(field):
            switches = fnmatch.filter(values, info.detail)
            is_off = all(switch == default for switch, default in map(values.__getitem__, switches))
            if is_off and path not in _JUDGED_ELSEWHERE:
                switch, _ = values[switches[0]]
                by_reason.setdefault(f"{info.detail} = {switch!r}", []).append(f"{path} = {value!r}")
        elif info.forced and requested is not None and requested != value:
            yield f"{path} = {requested!r} is ignored: it is always {info.derived} = {value!r}"
    for reason, keys in by_reason.items():
        yield f"no effect: {', '.join(keys)} ({reason})"
    if not config.ckpt.enable_save_ckpt:
        fields = type(config.ckpt).model_fields
        idle = [name for name in _ONLY_WHILE_SAVING if getattr(config.ckpt, name) != default_of(fields[name])]
        if idle:
            yield f"no effect: {', '.join(f'ckpt.{name}' for name in idle)} (saving is off)"
