"""FLOPs of the model of a run: by the dimensions of its architecture, or counted in a class of transformers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from internlm.config.schema import Config
from internlm.config.schema.root import HF_CLASS
from internlm.estimate.dimensions import ModelDimensions
from internlm.estimate.flops import class_flops_per_token, flops_per_token, head_flops_per_token
from internlm.model.architecture import Architecture
from internlm.model.hf_class.model import HfClassModel
from internlm.utils.errors import ConfigError


@dataclass(frozen=True)
class TokenFlops:
    """Model FLOPs to train on one token, see `internlm.estimate.flops`.

    Attributes:
        full, causal: of the whole model, in both conventions.
        head: part of it, of the output head.
        later: part of it, of layers that predict later tokens, causal.
    """

    full: float
    causal: float
    head: float
    later: float = 0.0


def token_flops(config: Config, model: nn.Module) -> TokenFlops:
    """The FLOPs of the model of a config.

    Args:
        config: of the run.
        model: it, or a pipeline stage of it.

    Raises:
        ConfigError: they are not known.
    """
    seq_len = config.data.seq_len
    if config.model_type == HF_CLASS:
        return _class_flops(config, seq_len)
    architecture = getattr(model, "architecture", None)
    if not isinstance(architecture, Architecture):
        raise ConfigError(f"the FLOPs of a {config.model_type} are not known: it is no decoder of this package")
    dimensions = ModelDimensions.of(architecture)
    causal = flops_per_token(dimensions, seq_len, "causal")
    return TokenFlops(
        full=flops_per_token(dimensions, seq_len, "full"),
        causal=causal,
        head=head_flops_per_token(dimensions),
        later=causal - flops_per_token(replace(dimensions, num_multi_token=0), seq_len, "causal"),
    )


def _class_flops(config: Config, seq_len: int) -> TokenFlops:
    # A new one: the model of the run may be a stage, and its linear layers are parts.
    with torch.device("meta"):
        model = HfClassModel(config.model)
    gemms = model.gemm_flops_per_token()
    if gemms is None:
        raise ConfigError(
            f"the FLOPs of a {model.class_name} are not known: besides attention, those of its layers are not "
            "proportional to the number of tokens"
        )
    full, causal = (
        class_flops_per_token(gemms, model.attention_calls, seq_len, convention) for convention in ("full", "causal")
    )
    return TokenFlops(full, causal, head=6.0 * model.vocab_size * model.residual_size)
