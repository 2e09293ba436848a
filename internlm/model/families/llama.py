"""Llama 2 and 3: no biases, separate projections. Llama 3 sets `rope_scaling`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from internlm.model.architecture import Architecture, FamilyDefaults
from internlm.model.decoder import Decoder
from internlm.model.registry import register_model

if TYPE_CHECKING:
    from internlm.config.schema import ModelConfig


@register_model("LLAMA2")
def llama2(config: ModelConfig, norm_dtype: torch.dtype | None) -> Decoder:
    return Decoder(Architecture.resolve(config, FamilyDefaults(), norm_dtype=norm_dtype))


@register_model("LLAMA3")
def llama3(config: ModelConfig, norm_dtype: torch.dtype | None) -> Decoder:
    return Decoder(Architecture.resolve(config, FamilyDefaults(), norm_dtype=norm_dtype))
