"""InternLM2: Llama with grouped-query attention and wqkv fused by key-value group."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from internlm.model.architecture import Architecture, FamilyDefaults
from internlm.model.decoder import Decoder
from internlm.model.registry import register_model

if TYPE_CHECKING:
    from internlm.config.schema import ModelConfig


@register_model("INTERNLM2")
def internlm2(config: ModelConfig, norm_dtype: torch.dtype | None) -> Decoder:
    return Decoder(Architecture.resolve(config, FamilyDefaults(fused_qkv=True), norm_dtype=norm_dtype))
