"""Gemma: GeGLU, norms that scale by 1 + weight, embeddings times sqrt(hidden_size), tied head.

InternEvo's Gemma has a separate head: `tie_word_embeddings = False`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from internlm.model.architecture import Architecture, FamilyDefaults
from internlm.model.decoder import Decoder
from internlm.model.registry import register_model

if TYPE_CHECKING:
    from internlm.config.schema import ModelConfig

GEMMA = FamilyDefaults(activation="gelu_tanh", unit_offset_norm=True, scale_embedding=True, tie_word_embeddings=True)


@register_model("GEMMA")
def gemma(config: ModelConfig, norm_dtype: torch.dtype | None) -> Decoder:
    return Decoder(Architecture.resolve(config, GEMMA, norm_dtype=norm_dtype))
