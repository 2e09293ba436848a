"""OLMoE: RMSNorm over all heads of q and of k together, and routed experts whose weights are not normalized.

Source: https://arxiv.org/abs/2409.02060. Published models have `normalize_expert_weights = False` in
`moe_layer_kwargs`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from internlm.model.architecture import Architecture, FamilyDefaults
from internlm.model.decoder import Decoder
from internlm.model.registry import register_model

if TYPE_CHECKING:
    from internlm.config.schema import ModelConfig


@register_model("OLMOE")
def olmoe(config: ModelConfig, norm_dtype: torch.dtype | None) -> Decoder:
    defaults = FamilyDefaults(qk_norm=True, norms_whole_projections=True)
    return Decoder(Architecture.resolve(config, defaults, norm_dtype=norm_dtype, shared_mix="sum"))
