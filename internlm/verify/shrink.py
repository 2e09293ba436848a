"""Shrinks a user's config to the size of a laptop, and keeps every feature that interacts with parallelism."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from internlm.config.hf_class import resized_model_section, small_sizes
from internlm.config.schema import Config
from internlm.initialize.stages import build_meta_model, parameter_groups
from internlm.solver.optimizer.parameter_groups import group_of, is_frozen
from internlm.verify.case import (
    ADAM_EPSILON,
    FLOAT8_HEAD_DIM,
    FLOAT8_KEYS,
    FLOAT8_SEQ_LEN,
    HEAD_DIM,
    LEARNING_RATE,
    MICRO_BSZ,
    SEQ_LEN,
    changed,
    float8_kv_heads,
    needed_micro_batches,
)
from internlm.verify.choices import FLOAT8_LATENT_KEYS, LATENT_KEYS, LayoutChoices
from internlm.verify.vision import small_vision_keys

LARGEST_GROUP_OF_HEADS = 4
WINDOW = 6
"""Shorter than a sequence, so that a sliding window has an effect."""


def shrink(config: Config, dtype: str | None = "torch.float32", *, float8: bool = False) -> Config:
    """Reduce a config to fewer and narrower layers and short sequences, with the same family, flags and layout.

    The ratio of query to key-value heads is kept up to 4, or up to what gives each rank a query head. The number of
    key-value heads stays below the tensor size, or a multiple of it, as before. A vocabulary that the ranks do not
    divide evenly stays indivisible. Learning rate and epsilon of the optimizer are those of `case.py`. A budget of
    activations, which so small a model never exceeds, is removed, and so are files of routing. Parameter groups are
    kept if they match a parameter of the small model.

    Args:
        config: a checked config.
        dtype: of weights and computation; None keeps the config's. Float8 is turned off, because its rounding amplifies
            a different order of additions to the size of a defect.
        float8: keep float8, in float64 (see `case.FLOAT8_KEYS`). No tensor has another dtype or is offloaded, and every
            tensor rank has a key-value head of its own (see `case.float8_kv_heads`).
    """
    layout, model = LayoutChoices.of(config), config.model
    tensor = layout.tensor
    heads, kv_heads = model.num_attention_heads, model.num_kv_attention_heads or model.num_attention_heads
    group = min(heads // kv_heads, LARGEST_GROUP_OF_HEADS)
    # Two heads per rank detect heads that are mixed up; if there are fewer heads than ranks, their number is kept.
    small_kv = kv_heads if kv_heads <= tensor else tensor * min(kv_heads // tensor, 2)
    if float8:
        small_kv = float8_kv_heads(small_kv, layout)
    head_dim = FLOAT8_HEAD_DIM if float8 else HEAD_DIM
    small_heads = small_kv * _multiple(group, max(1, tensor // small_kv))
    chunks = layout.pipeline * layout.chunks
    divisor = math.lcm(tensor, layout.weight)
    keys: dict[str, Any] = {
        "model.num_attention_heads": small_heads,
        "model.num_kv_attention_heads": small_kv if model.num_kv_attention_heads else None,
        "model.hidden_size": _multiple(head_dim * small_heads, math.lcm(head_dim, divisor)),
        "model.head_dim": head_dim,
        "model.num_layers": min(model.num_layers, max(2, chunks)),
        "model.intermediate_size": 7 * head_dim * divisor,
        "model.moe_intermediate_size": 5 * head_dim * divisor if model.moe_intermediate_size else None,
        "model.first_k_dense_replace": min(len(model.dense_layers), 1) if model.num_experts > 1 else 0,
        "model.mlp_only_layers": (),
        "model.vocab_size": _multiple(64, divisor) + model.vocab_size % divisor,
        "model.max_window_layers": min(model.max_window_layers, 1),
        "model.checkpoint_budget": None,
        "data.seq_len": _multiple(SEQ_LEN, tensor * (FLOAT8_SEQ_LEN if float8 else 1)),
        "data.micro_bsz": MICRO_BSZ,
        "data.micro_num": needed_micro_batches(layout),
        "data.gradient_accumulation": needed_micro_batches(layout),
        "adam.lr": LEARNING_RATE,
        "adam.adam_eps": ADAM_EPSILON,
        "lr_scheduler.eta_min": 0.0,
        "float8.enable_float8_linear": False,
        "moe.replay": {},
    }
    if model.kv_lora_rank is not None:
        latent = FLOAT8_LATENT_KEYS if float8 else LATENT_KEYS
        keys |= {key: value for key, value in latent.items() if getattr(model, key.split(".")[1]) is not None}
        keys["model.head_dim"] = None
    if model.sliding_window is not None:
        keys["model.sliding_window"] = WINDOW
    if model.hf_class is not None:
        keys = {key: value for key, value in keys.items() if not key.startswith("model.")}
        keys["model.checkpoint_budget"] = None
        sizes = small_sizes(heads=small_heads, kv_heads=small_kv, layers=max(4, chunks), window=WINDOW)
        keys |= {f"model.{key}": value for key, value in resized_model_section(model.hf_class, sizes).items()}
    if config.model_type == "LLAVA":
        keys |= small_vision_keys(config, keys["model.hidden_size"], keys["model.vocab_size"])
    if dtype is not None:
        keys["model.dtype"] = dtype
    if float8:
        keys |= FLOAT8_KEYS
        keys["use_fp32_norm"] = keys["model.residual_in_fp32"] = False
        keys["hybrid_zero_optimizer.offload_optimizer"] = False
    if keys.get("model.dtype") in ("torch.float32", "torch.float64"):
        keys["reduce_comm_dtype"] = None
        keys["hybrid_zero_optimizer.grad_accumulation_dtype"] = "torch.float32"
        keys["adam.moments_dtype"] = "torch.float32"
    small = changed(config, keys)
    return changed(small, {"optimizer.groups": _matching_groups(small)}) if config.optimizer.groups else small


def left_out(config: Config, small: Config) -> list[str]:
    """What of a run its small copy does not have, and what of the copy has no gradient to compare; one line each.

    Args:
        config: a checked config.
        small: the copy that `shrink` made of it.
    """
    names = [name for name, _ in build_meta_model(small).named_parameters()]
    kept = {group.match for group in small.optimizer.groups}
    lines = [
        f"optimizer.groups: {group.match!r} is left out: it applies to no parameter of the small copy, or freezes all"
        for group in config.optimizer.groups
        if group.match not in kept
    ]
    if config.model.checkpoint_budget is not None:
        lines.append("model.checkpoint_budget is left out: so small a model never exceeds it")
    if config.model_type == "LLAVA" and not config.data.is_multimodal:
        lines.append("batches without pictures, as data.is_multimodal is not set")
    num_frozen = sum(is_frozen(name, parameter_groups(small)) for name in names)
    if num_frozen:
        lines.append(f"{num_frozen} of {len(names)} tensors are frozen: weights are compared, and there is no gradient")
    return lines


def _matching_groups(small: Config) -> list[dict[str, Any]]:
    """The parameter groups that apply to a parameter of the small model; none if they would freeze all parameters."""
    names = [name for name, _ in build_meta_model(small).named_parameters()]
    groups = parameter_groups(small)
    groups = [group for group in groups if any(group_of(name, groups) is group for name in names)]
    if all(is_frozen(name, groups) for name in names):
        return []
    own = {group.match for group in small.optimizer.groups}
    return [asdict(group) for group in groups if group.match in own]


def _multiple(number: int, divisor: int) -> int:
    return -(-number // divisor) * divisor
