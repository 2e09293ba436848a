"""Defaults that differ from InternEvo's, so that a config that leaves out the key describes a different run.

One description with three readers: the notices at load, the page doc/from_internevo.md, and its test. Keys that one of
the two programs lacks are covered by their status in the schema, older spellings by `legacy.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from internlm.config.schema import Config
from internlm.config.schema.base import Status, key_info, walk_values

PAGE = "doc/from_internevo.md"

_STDS = (
    "model.embedding_init_std",
    "model.attn_wqkv_init_std",
    "model.attn_other_init_std",
    "model.ffn_uplayer_init_std",
    "model.ffn_other_init_std",
    "model.out_head_init_std",
)

_HALF = ("torch.bfloat16", "torch.float16", "torch.half")


@dataclass(frozen=True)
class DefaultDifference:
    """One default that differs.

    Attributes:
        keys: the keys concerned; the difference does not apply to those that the user set.
        here: value without the key in this project, as written in a config.
        theirs: value without the key in InternEvo.
        effect: what the value changes.
        families: model types concerned; empty: all.
        applies: whether the difference changes the numbers of a config.
        is_always_reported: whether it is reported for configs that were not written for InternEvo, too.
    """

    keys: tuple[str, ...]
    here: str
    theirs: str
    effect: str
    families: tuple[str, ...] = ()
    applies: Callable[[Config], bool] = lambda config: True
    is_always_reported: bool = False


def _from_scratch(config: Config) -> bool:
    return config.ckpt.load_ckpt_info is None


def _could_split_experts(config: Config) -> bool:
    tensor = config.parallel.tensor
    return config.model.num_experts > 1 and tensor.size > 1 and tensor.mode != "isp"


DIFFERENCES: tuple[DefaultDifference, ...] = (
    DefaultDifference(
        ("model.dtype",),
        "torch.bfloat16",
        "torch.float16",
        "dtype; bfloat16 needs no loss scale",
        is_always_reported=True,
    ),
    DefaultDifference(
        ("reduce_comm_dtype",),
        "torch.float32",
        "model.dtype",
        "dtype in which gradients are reduced over ranks",
        applies=lambda config: config.model.dtype in _HALF,
    ),
    DefaultDifference(
        ("adam.weight_decay_norms_and_biases",),
        "False",
        "True, without such a key",
        "weight decay of norms and biases",
        applies=lambda config: config.adam.weight_decay > 0,
    ),
    DefaultDifference(
        ("model.embed_grad_scale",),
        "1.0",
        "0.1",
        "factor on the gradient of the embedding",
    ),
    DefaultDifference(
        ("model.use_scaled_init",),
        "by the number of layers",
        "by the number of the layer",
        "standard deviation of the initial wo and w2, divided by sqrt(2 * that number)",
        applies=_from_scratch,
    ),
    DefaultDifference(
        _STDS,
        "0.02",
        "0.0052 for embedding and head, 0.006 for all others",
        "standard deviations of the initial weights",
        families=("INTERNLM",),
        applies=_from_scratch,
    ),
    DefaultDifference(
        _STDS,
        "0.02",
        "0.0052 for embedding and head, 0.006 for wqkv, w1 and w3, 0.0015 for wo and w2",
        "standard deviations of the initial weights",
        families=("BAICHUAN2",),
        applies=_from_scratch,
    ),
    DefaultDifference(
        ("model.no_bias",),
        "True",
        "False",
        "biases in attention",
        families=("INTERNLM2", "INTERNLM3", "LLAMA2", "BAICHUAN2", "GEMMA"),
        applies=lambda config: config.model.qkv_bias is None,
    ),
    DefaultDifference(
        ("model.norm_head",),
        "True",
        "False",
        "rows of the head are normalised",
        families=("BAICHUAN2",),
    ),
    DefaultDifference(
        ("model.tie_word_embeddings",),
        "True",
        "False, without such a key",
        "Gemma's head is its embedding",
        families=("GEMMA",),
    ),
    DefaultDifference(
        ("model.add_unit_offset",),
        "True, required",
        "False",
        "Gemma's norms multiply by 1 + weight",
        families=("GEMMA",),
    ),
    DefaultDifference(
        ("parallel.expert.no_tp",),
        "True",
        "False",
        "experts are whole, not split over the tensor group; the numbers are the same",
        applies=_could_split_experts,
    ),
)


def comes_from_internevo(config: Config, given: Callable[[str], Any]) -> bool:
    """Whether a config was written for InternEvo: it sets a key that exists here only for compatibility.

    `given(path)` is the value that the user gave for a path, or None.
    """
    for path, field, _ in walk_values(config):
        info = key_info(field)
        if info is not None and info.status is Status.NO_EFFECT and given(path) is not None:
            return True
    return False


def find_differences(config: Config, given: Callable[[str], Any]) -> Iterator[str]:
    """One line for each default by which the run differs from InternEvo's, if the config was written for it."""
    is_theirs = comes_from_internevo(config, given)
    lines = []
    for difference in DIFFERENCES:
        keys = [key for key in difference.keys if given(key) is None]
        if keys and (is_theirs or difference.is_always_reported) and _concerns(difference, config):
            name = keys[0] if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more"
            lines.append(f"{name} not set: {difference.here}, with InternEvo {difference.theirs} ({difference.effect})")
    info = config.ckpt.load_ckpt_info
    if is_theirs and info is not None and config.ckpt.auto_resume and not info.is_placeholder:
        lines.append(
            f"ckpt.load_ckpt_info: {info.path!r} is loaded when there is nothing to resume; InternEvo ignores it with "
            "ckpt.auto_resume = True"
        )
    scale = given("model.embed_grad_scale")
    if is_theirs and scale not in (None, 1):
        lines.append(
            f"model.embed_grad_scale = {scale} scales the gradient of the embedding; with InternEvo that of the head, "
            "too"
        )
    yield from lines
    if is_theirs and lines:
        yield f"all differences from InternEvo are listed in {PAGE}"


def _concerns(difference: DefaultDifference, config: Config) -> bool:
    """Whether a difference changes the run that a config describes."""
    return (not difference.families or config.model_type in difference.families) and difference.applies(config)
