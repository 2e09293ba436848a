"""Checks before the first step that a class of transformers computes here what it computes itself, on a small copy.

Whatever a class does that this project does not know (to its logits, to the arguments of attention, to its embedding)
makes the logits differ. Whatever passes from token to token outside of attention makes packed documents differ.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from internlm.config.hf_class import resized_model_section, small_sizes
from internlm.config.schema import Config, ModelConfig
from internlm.config.schema.root import HF_CLASS
from internlm.core.context.parallel_context import ParallelContext
from internlm.model.hf_class.model import HfClassModel
from internlm.model.initialization import initializer_of
from internlm.model.ops.attention.causal_attention import VarlenMetadata
from internlm.utils.errors import ConfigError
from internlm.utils.hf_classes import config_object, model_class

_LENGTHS = (11, 14)
"""Of the documents, longer than the window of the small copy."""

_LAYERS = 4, 8
"""Of a small copy, and of one where 4 layers do not run."""

_STD = 0.15
"""Of the weights: large enough that every part of a layer changes its output."""

TOLERANCE = 1e-3
"""Of the largest logit. Leaks and unknown factors of published classes are 0.01 and more, rounding in fp32 is 1e-5."""


_COEFFICIENTS = "router_aux_loss_coef", "aux_loss_coef"
"""Factors of the losses of routers in configs of transformers."""

_NOISE = "router_jitter_noise", "input_jitter_noise"
"""Ranges of random factors in configs of transformers."""


class ClassDifferences(NamedTuple):
    """Differences of logits from those of the class itself, in parts of the largest logit.

    Attributes:
        separate: of single documents.
        packed: of documents in one packed row.
        staged: of documents that pass through two pipeline stages; infinite if the class does not run so.
    """

    separate: float
    packed: float
    staged: float


def check_class(config: Config, context: ParallelContext) -> list[str]:
    """Compare a small copy of a class of transformers with the class itself.

    Returns:
        One line if no small copy can be built or run, so that nothing was compared.

    Raises:
        ConfigError: the class adds a loss of its routers; or the logits differ; or those of packed documents do or may,
            and the run packs; or those of pipeline stages, and it has them.
    """
    if config.model_type != HF_CLASS:
        return []
    assert config.model.hf_class is not None
    name = config.model.hf_class["model_class"].rpartition(".")[2]
    hf_config = config_object(config.model.hf_class)
    _check_router_loss(hf_config, name)
    # The class itself must be buildable: this raises what would stop the run.
    with torch.device("meta"):
        HfClassModel(config.model)
    try:
        differences = _differences_of_smallest_copy(config.model)
    except Exception as error:  # The code of any class runs here, with sizes that it may not be made for.
        line = f"{name} was not compared with itself: a small copy does not run ({type(error).__name__}: {error})"
        if config.data.use_packed_dataset:
            raise ConfigError(
                f"data.use_packed_dataset = True: {line}. Whether its packed documents see each other is unknown; set "
                "it to False"
            ) from error
        return [line]
    if not differences.separate <= TOLERANCE:
        noise = [f"{key} = {getattr(hf_config, key)}" for key in _NOISE if getattr(hf_config, key, None)]
        if noise:
            raise ConfigError(
                f"hf: {name} draws random numbers while it trains ({', '.join(noise)}), which no layout would repeat; "
                "set this to 0 in hf.cfg_extra_kwargs"
            )
        raise ConfigError(
            f"hf: the logits of a small {name} differ here from its own by {differences.separate:.1%}: it does "
            "something to its embedding, attention or logits that this project does not know, so its loss would be "
            "another one. Train it with transformers"
        )
    if config.data.use_packed_dataset and not differences.packed <= TOLERANCE:
        raise ConfigError(
            f"data.use_packed_dataset = True: in {name}, packed documents change each other's logits by "
            f"{differences.packed:.1%}, since its layers carry a state from token to token; set it to False"
        )
    if config.parallel.pipeline.size > 1 and not differences.staged <= TOLERANCE:
        raise ConfigError(
            f"parallel.pipeline.size = {config.parallel.pipeline.size}: stages of {name} compute other logits than the "
            f"whole model, by {differences.staged:.1%}: it does something to the input of its layers, such as adding "
            "positions, which every stage would repeat; set it to 1"
        )
    return []


def _check_router_loss(hf_config: Any, name: str) -> None:
    """Refuse a loss of routers, which the class adds to that of tokens: it depends on the micro-batches of a step."""
    if not getattr(hf_config, "output_router_logits", False):
        return
    found = {key: getattr(hf_config, key) for key in _COEFFICIENTS if hasattr(hf_config, key)}
    if found and not any(found.values()):
        return
    stated = "".join(f", {key} = {value}" for key, value in found.items())
    raise ConfigError(
        f"hf: {name} adds a loss of its routers to that of the tokens (output_router_logits = True{stated}), which "
        "depends on how a batch is cut into micro-batches and is not computed here. To train without it, set "
        "output_router_logits = False in hf.cfg_extra_kwargs or in config.json; families of this package have losses "
        "of routers (loss.moe_loss_coeff)"
    )


def _differences_of_smallest_copy(model: ModelConfig) -> ClassDifferences:
    """Those of a copy with a few layers; with more if it does not run, as their first layers may all lack attention."""
    few, many = _LAYERS
    try:
        return class_differences(small_copy(model, few))
    except Exception:
        return class_differences(small_copy(model, many))


def small_copy(model: ModelConfig, layers: int = 4) -> ModelConfig:
    """The model section in fp32 for the same class with small sizes and a number of layers."""
    assert model.hf_class is not None
    heads, kv_heads = model.num_attention_heads, model.num_kv_attention_heads or model.num_attention_heads
    # Latent attention, for one, has as many key-value heads as query heads.
    sizes = small_sizes(heads=4, kv_heads=4 if kv_heads == heads else 2, layers=layers, window=4)
    section = resized_model_section(model.hf_class, sizes)
    given = {key: value for key, value in section.items() if value is not None}
    return ModelConfig.model_validate({**given, "dtype": "torch.float32"})


@torch.no_grad()
def class_differences(config: ModelConfig) -> ClassDifferences:
    """How logits differ from those of the class itself, whose attention is eager and sees single documents.

    Args:
        config: of a small model in fp32.
    """
    model = _small_model(config)
    ids = torch.randint(3, config.vocab_size, (1, sum(_LENGTHS)), generator=torch.Generator().manual_seed(0))
    documents = ids.split(_LENGTHS, 1)
    original = _original(config, model)
    expected = torch.cat([original(input_ids=document, use_cache=False).logits for document in documents], 1)
    separate = torch.cat([_logits(model, document, None) for document in documents], 1)
    packed = _logits(model, ids, VarlenMetadata.of(_LENGTHS))
    try:
        staged = torch.cat([_logits_of_stages(config, document) for document in documents], 1)
    except Exception:  # A class may read what a stage does not have, in any way.
        staged = torch.full_like(expected, float("inf"))
    scale = expected.abs().max()
    return ClassDifferences(*(float((found - expected).abs().max() / scale) for found in (separate, packed, staged)))


def _small_model(config: ModelConfig) -> HfClassModel:
    with torch.device("meta"):
        model = HfClassModel(config)
    _draw_weights(model)
    return model


def _logits_of_stages(config: ModelConfig, ids: Tensor) -> Tensor:
    """As `_logits` of one document, by two pipeline stages."""
    first, last = _small_model(config), _small_model(config)
    middle = config.num_layers // 2
    first.keep_stage(range(middle), is_first=True, is_last=False)
    last.keep_stage(range(middle, config.num_layers), is_first=False, is_last=True)
    positions = torch.arange(ids.shape[1]).unsqueeze(0)
    return last.logits(last(first(ids, positions), positions))


def _logits(model: HfClassModel, ids: Tensor, varlen: VarlenMetadata | None) -> Tensor:
    lengths = (ids.shape[1],) if varlen is None else varlen.lengths
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    return model.logits(model(ids, positions, varlen))


def _original(config: ModelConfig, model: HfClassModel) -> nn.Module:
    """The class as transformers builds it, with the weights of `model`."""
    assert config.hf_class is not None
    hf_config = config_object(config.hf_class)
    original: nn.Module = model_class(config.hf_class)._from_config(
        hf_config, dtype=torch.float32, attn_implementation="eager"
    )
    state = original.state_dict()
    for name, parameter in model.named_parameters():
        state[name].copy_(parameter)
    return original.train()


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
