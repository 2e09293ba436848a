"""DeepSeek: latent attention, and experts of which some are shared without a gate.

DeepSeek-V2 (https://arxiv.org/abs/2405.04434) scores experts by a softmax; DeepSeek-V3
(https://arxiv.org/abs/2412.19437) and Kimi K2 (https://arxiv.org/abs/2507.20534) by sigmoids, with a selection bias.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from internlm.model.architecture import Architecture, FamilyDefaults
from internlm.model.decoder import Decoder
from internlm.model.registry import register_model

if TYPE_CHECKING:
    from internlm.config.schema import ModelConfig

DEEPSEEK = FamilyDefaults(latent_attention=True)


@register_model("DEEPSEEK_V2")
def deepseek_v2(config: ModelConfig, norm_dtype: torch.dtype | None) -> Decoder:
    return Decoder(Architecture.resolve(config, DEEPSEEK, norm_dtype=norm_dtype, shared_mix="sum"))


@register_model("DEEPSEEK_V3")
def deepseek_v3(config: ModelConfig, norm_dtype: torch.dtype | None) -> Decoder:
    return Decoder(Architecture.resolve(config, DEEPSEEK, norm_dtype=norm_dtype, shared_mix="sum"))


@register_model("KIMI_K2")
def kimi_k2(config: ModelConfig, norm_dtype: torch.dtype | None) -> Decoder:
    return Decoder(Architecture.resolve(config, DEEPSEEK, norm_dtype=norm_dtype, shared_mix="sum"))
