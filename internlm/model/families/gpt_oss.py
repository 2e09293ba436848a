"""gpt-oss: attention sinks, windows in every second layer, and experts with biases and a clamped SwiGLU.

Source: https://arxiv.org/abs/2508.10925. Published models have `sliding_window = 128` and YaRN without rounding of its
bounds (`rope_scaling.truncate = False`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from internlm.model.architecture import Architecture, FamilyDefaults
from internlm.model.decoder import Decoder
from internlm.model.registry import register_model

if TYPE_CHECKING:
    from internlm.config.schema import ModelConfig

GPT_OSS = FamilyDefaults(
    qkv_bias=True,
    o_bias=True,
    activation="clamped_silu",
    attention_sinks=True,
    expert_biases=True,
    sliding_window=True,
    sliding_window_pattern=2,
)


@register_model("GPT_OSS")
def gpt_oss(config: ModelConfig, norm_dtype: torch.dtype | None) -> Decoder:
    return Decoder(Architecture.resolve(config, GPT_OSS, norm_dtype=norm_dtype, shared_mix="sum"))
