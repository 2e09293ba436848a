"""Mistral: Llama with a sliding window in all layers if `sliding_window` is given. Mixtral: Mistral with experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from internlm.model.architecture import Architecture, FamilyDefaults
from internlm.model.decoder import Decoder
from internlm.model.registry import register_model

if TYPE_CHECKING:
    from internlm.config.schema import ModelConfig


@register_model("MISTRAL")
def mistral(config: ModelConfig, norm_dtype: torch.dtype | None) -> Decoder:
    return Decoder(Architecture.resolve(config, FamilyDefaults(sliding_window=True), norm_dtype=norm_dtype))


@register_model("MIXTRALMOE")
def mixtral(config: ModelConfig, norm_dtype: torch.dtype | None) -> Decoder:
    defaults = FamilyDefaults(sliding_window=True)
    return Decoder(Architecture.resolve(config, defaults, norm_dtype=norm_dtype, shared_mix="softmax"))
