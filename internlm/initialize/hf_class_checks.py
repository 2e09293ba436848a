"""Checks before the first step that a class of transformers keeps packed documents apart, on a small copy of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from internlm.config.hf_class import resized_model_section
from internlm.config.schema import Config, ModelConfig
from internlm.config.schema.root import HF_CLASS
from internlm.core.context.parallel_context import ParallelContext
from internlm.model.hf_class.model import HfClassModel
from internlm.model.initialization import initializer_of
from internlm.model.ops.attention.causal_attention import VarlenMetadata
from internlm.utils.errors import ConfigError

_SIZES = {
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 97,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": 4,
}

_LENGTHS = (11, 14)

_STD = 0.15
"""Of the weights: large enough that every part of a layer changes its output."""

_TOLERANCE = 1e-3
"""Of the largest hidden state. Leaks of published classes are 0.01 and more, rounding in fp32 is below 1e-5."""


def check_packing_of_class(config: Config, context: ParallelContext) -> list[str]:
    """Compare packed documents with separate ones in a small copy of the class.

    Raises:
        ConfigError: they differ, as where layers pass a state from token to token.
    """
    if config.model_type != HF_CLASS or not config.data.use_packed_dataset:
        return []
    assert config.model.hf_class is not None
    section = resized_model_section(config.model.hf_class, _SIZES)
    small = {key: value for key, value in section.items() if value is not None}
    difference = packing_difference(ModelConfig.model_validate({**small, "dtype": "torch.float32"}))
    if difference > _TOLERANCE:
        name = config.model.hf_class["model_class"].rpartition(".")[2]
        raise ConfigError(
            f"data.use_packed_dataset = True: in {name}, packed documents change each other's hidden states by "
            f"{difference:.1%}, since its layers carry a state from token to token; set it to False"
        )
    return []


@torch.no_grad()
def packing_difference(config: ModelConfig) -> float:
    """By how much hidden states of packed documents differ from those of separate ones, in parts of the largest."""
    with torch.device("meta"):
        model = HfClassModel(config)
    _draw_weights(model)
    ids = torch.randint(3, config.vocab_size, (1, sum(_LENGTHS)), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(length) for length in _LENGTHS]).unsqueeze(0)
    packed: Tensor = model(ids, positions, VarlenMetadata.of(_LENGTHS))
    separate = torch.cat([model(part, torch.arange(part.shape[1]).unsqueeze(0)) for part in ids.split(_LENGTHS, 1)], 1)
    return float((packed - separate).abs().max() / separate.abs().max())


def _draw_weights(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    drawn: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in drawn:
                values = torch.empty(parameter.shape, dtype=parameter.dtype)
                initializer_of(parameter).fill(values, generator)
                if parameter.ndim > 1 and parameter.requires_grad:
                    values.normal_(0.0, _STD, generator=generator)
                drawn[parameter] = nn.Parameter(values, requires_grad=False)
            setattr(module, name, drawn[parameter])
