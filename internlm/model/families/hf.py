"""The model type "hf": any decoder of transformers, see `internlm.model.hf_class`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from internlm.model.registry import register_model
from internlm.utils.errors import ConfigError

if TYPE_CHECKING:
    from internlm.config.schema import ModelConfig


@register_model("hf")
def hf_class(config: ModelConfig, norm_dtype: torch.dtype | None) -> nn.Module:
    """The class that the `hf` section of the config names."""
    from internlm.model.hf_class.model import HfClassModel  # Imported here, as transformers is optional.

    if norm_dtype is not None:
        raise ConfigError("use_fp32_norm = True: norms of a Hugging Face class compute as it says; set it to False")
    return HfClassModel(config)
