"""Registry of the formats that `ckpt.load_ckpt_info.ckpt_type` accepts besides the native one."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import nn

from internlm.checkpoint.weight_source import WeightSource
from internlm.config.hf_class import filled_model_section
from internlm.config.schema import Config
from internlm.config.schema.root import HF_CLASS
from internlm.convert.hf_class_weights import HfClassWeights
from internlm.convert.hf_folder import HfFolder
from internlm.convert.llama_folder import MetaLlamaWeights, trained_keys
from internlm.convert.llava_folder import open_folder_weights, open_hf_folder
from internlm.model.architecture import Architecture
from internlm.model.decoder import Decoder
from internlm.model.hf_class.model import HfClassModel
from internlm.utils.errors import ConfigError, nearest
from internlm.utils.logging import get_logger
from internlm.utils.storage import StoragePath

logger = get_logger(__name__)

Opener = Callable[[StoragePath, nn.Module], WeightSource]

_OPENERS: dict[str, Opener] = {}


def register_checkpoint_type(name: str) -> Callable[[Opener], Opener]:
    """Decorator: register a format as `ckpt_type = name`.

    The function takes the path and this rank's part of the model, and returns a `WeightSource` of the whole model. It
    is called on every rank.

    Raises:
        ValueError: the name is taken.
    """

    def decorate(opener: Opener) -> Opener:
        if name in _OPENERS or name == "internevo":
            raise ValueError(f"checkpoint type '{name}' is already registered")
        _OPENERS[name] = opener
        return opener

    return decorate


def open_weights(ckpt_type: str, path: StoragePath, model: nn.Module) -> WeightSource:
    """Open the weights at `path`, with the names and shapes of `model`.

    Raises:
        ConfigError: the type is unknown, or does not support this model.
        CheckpointError: there are no weights, or they do not fit the model.
    """
    known = ("internevo", *_OPENERS)
    if ckpt_type not in _OPENERS:
        raise ConfigError(
            f"ckpt.load_ckpt_info.ckpt_type: unknown type '{ckpt_type}', known: {', '.join(known)}."
            f"{nearest(ckpt_type, known)}"
        )
    return _OPENERS[ckpt_type](path, model)


def trained_as(ckpt_type: str, path: StoragePath, config: Config) -> Config | None:
    """`config` with the model that the weights at `path` were trained with; None if their format does not record it.

    Raises:
        ConfigError: the weights are of an unsupported family or use an unsupported feature.
        CheckpointError: the folder's description of the model is missing or damaged.
    """
    values = config.model_dump(mode="json")
    if ckpt_type == "hf" and config.model_type == HF_CLASS:
        trusts = config.hf.trust_remote_code
        section = filled_model_section({"folder": str(path), "trust_remote_code": trusts}, {})
        values["model"] |= section
    elif ckpt_type == "hf":
        found = open_hf_folder(path).model
        keys = {**found.keys, "dtype": config.model.dtype}
        model_type = found.model_type
        if config.model_type == "LLAVA" != model_type:
            # The weights of a language model are loaded into the decoder of a LLaVA.
            model_type = "LLAVA"
            keys |= {name: values["model"][name] for name in ("image_token_id", "vit_cfg", "vision_proj_cfg")}
        values |= {"model_type": model_type, "model": keys}
    elif ckpt_type == "llama":
        values["model"] |= trained_keys(path, values["model"])
    else:
        return None
    return Config.model_validate(values)


@register_checkpoint_type("hf")
def _open_hf(path: StoragePath, model: nn.Module) -> WeightSource:
    if isinstance(model, HfClassModel):
        return HfClassWeights(HfFolder(path), model)
    folder = open_hf_folder(path)
    for line in folder.model.notices:
        logger.warning("%s: %s", path, line)
    _architecture(model, "hf")
    return open_folder_weights(folder, cast(Decoder, model))


@register_checkpoint_type("llama")
def _open_llama(path: StoragePath, model: nn.Module) -> WeightSource:
    return MetaLlamaWeights(path, _architecture(model, "llama"))


def _architecture(model: nn.Module, ckpt_type: str) -> Architecture:
    architecture = getattr(model, "architecture", None)
    if not isinstance(architecture, Architecture):
        raise ConfigError(
            f"ckpt.load_ckpt_info.ckpt_type '{ckpt_type}': {type(model).__name__} is not a decoder of this package; "
            f"register your own type (internlm.convert.checkpoint_types.register_checkpoint_type)"
        )
    return architecture
