"""GLM-4.5: half of the channels of a head rotate; routed experts chosen by sigmoids, beside an ungated shared one.

Source: https://arxiv.org/abs/2508.06471. Published models have `scoring_func = "sigmoid"` and `selection_bias = True`
in `moe_layer_kwargs`; the large one also normalizes queries and keys (`qk_norm`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from internlm.model.architecture import Architecture, FamilyDefaults
from internlm.model.decoder import Decoder
from internlm.model.registry import register_model

if TYPE_CHECKING:
    from internlm.config.schema import ModelConfig


@register_model("GLM4_MOE")
def glm4_moe(config: ModelConfig, norm_dtype: torch.dtype | None) -> Decoder:
    defaults = FamilyDefaults(qkv_bias=True, partial_rotary_factor=0.5)
    return Decoder(Architecture.resolve(config, defaults, norm_dtype=norm_dtype, shared_mix="sum"))
