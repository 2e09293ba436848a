"""The registry of model types: those of this package, and those registered by users.

A builder is a function `(config: ModelConfig, norm_dtype) -> nn.Module`; doc/models.md describes the interface of the
module.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from internlm.utils.errors import ConfigError, nearest
from internlm.utils.former_names import explain_former_names

explain_former_names(__name__)

if TYPE_CHECKING:
    from internlm.config.schema import ModelConfig

ModelBuilder = Callable[["ModelConfig", torch.dtype | None], nn.Module]

_FAMILY_MODULES = (
    "hf",
    "internlm",
    "internlm2",
    "internlm3",
    "llama",
    "qwen",
    "baichuan",
    "gemma",
    "mistral",
    "glm",
    "deepseek",
    "olmoe",
    "gpt_oss",
    "llava",
)

_BUILDERS: dict[str, ModelBuilder] = {}


def register_model(name: str) -> Callable[[ModelBuilder], ModelBuilder]:
    """Decorator that registers a builder for `model_type = name`.

    The builder takes the `model` section of the config and the dtype of the norms' weights (None: that of the model).
    It is called under `torch.device("meta")`.

    Raises:
        ValueError: the name is taken.
    """

    def decorate(builder: ModelBuilder) -> ModelBuilder:
        if name in _BUILDERS:
            raise ValueError(f"model type '{name}' is already registered")
        _BUILDERS[name] = builder
        return builder

    return decorate


def known_models() -> tuple[str, ...]:
    """All registered model types."""
    for module in _FAMILY_MODULES:
        importlib.import_module(f"internlm.model.families.{module}")
    return tuple(sorted(_BUILDERS))


def build_model(model_type: str, config: ModelConfig, *, norm_dtype: torch.dtype | None = None) -> nn.Module:
    """Build a registered model on the current default device (use `with torch.device("meta")`).

    Args:
        model_type: a registered name.
        config: the `model` section of a config.
        norm_dtype: dtype of the norms' weights, e.g. fp32 for `use_fp32_norm`; None: that of the model.

    Raises:
        ConfigError: the name is unknown, or the config is inconsistent.
    """
    known = known_models()
    if model_type not in known:
        raise ConfigError(
            f"model_type: unknown model '{model_type}', known: {', '.join(known)}.{nearest(model_type, known)}"
        )
    return _BUILDERS[model_type](config, norm_dtype)
