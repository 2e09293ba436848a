"""LLaVA: the decoder of Llama 2 behind a vision tower."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from internlm.model.architecture import Architecture, FamilyDefaults
from internlm.model.registry import register_model

if TYPE_CHECKING:
    from internlm.config.schema import ModelConfig
    from internlm.model.llava.model import Llava


@register_model("LLAVA")
def llava(config: ModelConfig, norm_dtype: torch.dtype | None) -> Llava:
    # Builders are imported with all others; transformers is only needed for this one.
    from internlm.model.llava.model import Llava

    return Llava(Architecture.resolve(config, FamilyDefaults(), norm_dtype=norm_dtype), config)
