"""InternLM (first generation): multi-head attention with biases, fused wqkv; and its mixture of experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from internlm.model.architecture import Architecture, FamilyDefaults
from internlm.model.decoder import Decoder
from internlm.model.registry import register_model

if TYPE_CHECKING:
    from internlm.config.schema import ModelConfig


@register_model("INTERNLM")
def internlm(config: ModelConfig, norm_dtype: torch.dtype | None) -> Decoder:
    return Decoder(
        Architecture.resolve(config, FamilyDefaults(fused_qkv=True, qkv_bias=True, o_bias=True), norm_dtype=norm_dtype)
    )


@register_model("INTERNLM_MoE")
def internlm_moe(config: ModelConfig, norm_dtype: torch.dtype | None) -> Decoder:
    defaults = FamilyDefaults(fused_qkv=True, qkv_bias=True, o_bias=True)
    return Decoder(Architecture.resolve(config, defaults, norm_dtype=norm_dtype, shared_mix="softmax"))
