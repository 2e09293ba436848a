"""Qwen2: biases on q, k and v; with `use_sliding_window`, windows from layer `max_window_layers` on.

Qwen3: no biases, RMSNorm of every query and key head.

Their mixtures of experts are the same but for the feed-forward blocks. The shared experts of Qwen2-MoE have a sigmoid
gate (https://arxiv.org/abs/2407.10671); Qwen3-MoE has none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from internlm.model.architecture import Architecture, FamilyDefaults
from internlm.model.decoder import Decoder
from internlm.model.registry import register_model

if TYPE_CHECKING:
    from internlm.config.schema import ModelConfig


@register_model("QWEN2")
def qwen2(config: ModelConfig, norm_dtype: torch.dtype | None) -> Decoder:
    return Decoder(Architecture.resolve(config, FamilyDefaults(qkv_bias=True), norm_dtype=norm_dtype))


@register_model("QWEN3")
def qwen3(config: ModelConfig, norm_dtype: torch.dtype | None) -> Decoder:
    return Decoder(Architecture.resolve(config, FamilyDefaults(qk_norm=True), norm_dtype=norm_dtype))


@register_model("QWEN2MOE")
def qwen2_moe(config: ModelConfig, norm_dtype: torch.dtype | None) -> Decoder:
    defaults = FamilyDefaults(qkv_bias=True)
    return Decoder(Architecture.resolve(config, defaults, norm_dtype=norm_dtype, shared_mix="sigmoid"))


@register_model("QWEN3MOE")
def qwen3_moe(config: ModelConfig, norm_dtype: torch.dtype | None) -> Decoder:
    defaults = FamilyDefaults(qk_norm=True)
    return Decoder(Architecture.resolve(config, defaults, norm_dtype=norm_dtype, shared_mix="sigmoid"))
