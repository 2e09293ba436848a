"""Small models with storage, for tests that need no parallel floor."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from internlm.config.schema import ModelConfig
from internlm.model.initialization import initializer_of
from internlm.model.registry import build_model, known_models

TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_layers": 2,
    "num_attention_heads": 6,
    "intermediate_size": 88,
    "dtype": "torch.float32",
}

DECODERS = tuple(name for name in known_models() if name not in ("hf", "LLAVA"))
"""The model types that a model section of sizes describes; a class of transformers and a vision tower need a folder."""

LATENT_FAMILIES = ("DEEPSEEK_V2", "DEEPSEEK_V3", "KIMI_K2")

LATENT: dict[str, Any] = {
    "num_kv_attention_heads": None,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}
"""Sizes that latent attention needs, instead of those of other attention."""


def tiny_config(model_type: str = "", **keys: Any) -> ModelConfig:
    """A model section of odd sizes; `keys` replace or add, but for those that the family cannot have."""
    if model_type in LATENT_FAMILIES:
        others = ("num_kv_attention_heads", "enable_qkv_fusion")
        keys = {**LATENT, **{key: value for key, value in keys.items() if key not in others}}
    return ModelConfig(**{**TINY, **keys})


def materialize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give a model built on the meta device its storage on CPU and its initial values."""
    recipes = {name: initializer_of(parameter) for name, parameter in model.named_parameters()}
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        recipes[name].fill(parameter, generator)
    return model


def tiny_model(model_type: str, seed: int = 0, norm_dtype: torch.dtype | None = None, **keys: Any) -> Any:
    """A registered model of `tiny_config(**keys)` with initial values."""
    with torch.device("meta"):
        model = build_model(model_type, tiny_config(model_type, **keys), norm_dtype=norm_dtype)
    return materialize(model, seed)
