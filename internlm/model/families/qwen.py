"""Qwen2: biases on q, k and v; with `use_sliding_window`, windows from layer `max_window_layers` on.

Qwen3: no biases, RMSNorm of every query and key head.
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
