"""InternLM3: InternLM2 with separate wq, wk, wv."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from internlm.model.architecture import Architecture, FamilyDefaults
from internlm.model.decoder import Decoder
from internlm.model.registry import register_model

if TYPE_CHECKING:
    from internlm.config.schema import ModelConfig


@register_model("INTERNLM3")
def internlm3(config: ModelConfig, norm_dtype: torch.dtype | None) -> Decoder:
    return Decoder(Architecture.resolve(config, FamilyDefaults(), norm_dtype=norm_dtype))
