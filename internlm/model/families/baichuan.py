"""Baichuan2: multi-head attention with one fused projection, output head with normalized rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from internlm.model.architecture import Architecture, FamilyDefaults
from internlm.model.decoder import Decoder
from internlm.model.registry import register_model

if TYPE_CHECKING:
    from internlm.config.schema import ModelConfig


@register_model("BAICHUAN2")
def baichuan2(config: ModelConfig, norm_dtype: torch.dtype | None) -> Decoder:
    return Decoder(Architecture.resolve(config, FamilyDefaults(fused_qkv=True, norm_head=True), norm_dtype=norm_dtype))
