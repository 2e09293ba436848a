"""Projectors: from hidden states of a vision tower to embeddings of a language model.

Source: LLaVA-1.5, Liu et al. 2023, https://arxiv.org/abs/2310.03744.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from internlm.model.initialization import Uniform, set_initializer
from internlm.utils.errors import ConfigError


def make_projector(kind: str, width: int, hidden_size: int, dtype: torch.dtype) -> nn.Sequential:
    """The projector `[..., width]` -> `[..., hidden_size]`; its linear layers are linear_1, linear_2 ...

    Args:
        kind: "linear", "identity", or "mlpNx_gelu": N linear layers with GELU between them.
        width: of the vision tower.
        hidden_size: of the language model.
        dtype: of the weights.

    Raises:
        ConfigError: "identity" between different widths.
    """
    depth = num_linear_layers(kind)
    if depth == 0 and width != hidden_size:
        raise ConfigError(
            f"model.vision_proj_cfg.mm_projector_type = 'identity': the vision tower has width {width}, the language "
            f"model {hidden_size}; use 'linear' or 'mlp2x_gelu'"
        )
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    for number in range(1, depth + 1):
        if number > 1:
            modules[f"gelu_{number - 1}"] = nn.GELU()
        linear = nn.Linear(width if number == 1 else hidden_size, hidden_size, dtype=dtype)
        for parameter in (linear.weight, linear.bias):
            # As torch initializes its linear layers.
            set_initializer(parameter, Uniform(linear.in_features**-0.5))
        modules[f"linear_{number}"] = linear
    return nn.Sequential(modules)


def num_linear_layers(kind: str) -> int:
    """Number of linear layers of a projector."""
    if kind in ("identity", "linear"):
        return int(kind == "linear")
    return int(kind.removeprefix("mlp").removesuffix("x_gelu"))
