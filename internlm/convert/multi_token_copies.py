"""Layers that predict later tokens in Hugging Face folders: as in DeepSeek-V3's, with copies of embedding and head.

Layer m of them is `model.layers.{L + m - 1}` of a model of L layers. Besides a decoder layer it has `enorm`, `hnorm`,
`eh_proj` `[h, 2h]` (columns of the embedding first) and `shared_head.norm`. transformers does not read these layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from torch import Tensor

from internlm.convert.redundant import tied_difference
from internlm.model.architecture import Architecture
from internlm.model.huggingface.expert_config import mixture_kind
from internlm.model.huggingface.from_config import HfModel
from internlm.utils.errors import CheckpointError

_KEY = "num_nextn_predict_layers"
_KINDS = ("deepseek_v3", "kimi_k2", "glm4_moe")
"""`model_type` of config.json of the families whose files have these layers."""


def with_multi_token_layers(model: HfModel, config: Mapping[str, Any], names: Collection[str]) -> HfModel:
    """The model of a config.json, with the layers that predict later tokens if the folder has them.

    Args:
        model: of the config.json.
        config: its content.
        names: of the tensors in the folder.
    """
    number = config.get(_KEY) or 0
    first = model.keys["num_layers"]
    has_layers = _has_layers(config, names, first)
    if has_layers and number:
        return dataclasses.replace(model, keys={**model.keys, _KEY: number})
    if not has_layers and not number:
        return model
    notice = f"{_KEY} = {number}: layers of multi-token prediction are not imported"
    return dataclasses.replace(model, notices=(*model.notices, notice))


def leaves_layers_out(config: Mapping[str, Any], names: Collection[str], num_layers: int) -> bool:
    """Whether a model without layers that predict later tokens leaves out those of a folder, of which a notice tells.

    Args:
        config: content of config.json.
        names: of the tensors in the folder.
        num_layers: of the model.
    """
    return bool(config.get(_KEY)) or _has_layers(config, names, num_layers)


def _has_layers(config: Mapping[str, Any], names: Collection[str], first: int) -> bool:
    return config.get("model_type") in _KINDS and f"model.layers.{first}.eh_proj.weight" in names


def has_multi_token_form(architecture: Architecture) -> bool:
    """Whether the family's files have layers that predict later tokens."""
    return mixture_kind(architecture) in _KINDS


def copies(architecture: Architecture) -> Iterator[tuple[str, str]]:
    """(name of a copy, name of its original) in DeepSeek-V3's files."""
    head = "model.embed_tokens.weight" if architecture.tie_word_embeddings else "lm_head.weight"
    for layer in architecture.multi_token_layers:
        yield f"model.layers.{layer}.embed_tokens.weight", "model.embed_tokens.weight"
        yield f"model.layers.{layer}.shared_head.head.weight", head


def check_copies(
    read: Callable[[str], Tensor], names: Collection[str], architecture: Architecture, where: str
) -> list[str]:
    """The copies of embedding and head in a folder, after comparison with them.

    Args:
        read: reads a tensor of the folder.
        names: of its tensors.
        architecture: of the model.
        where: the folder, for messages.

    Raises:
        CheckpointError: a copy differs: the layers of this package share embedding and head with the model.
    """
    found = []
    for copy, original in copies(architecture):
        if copy not in names or original not in names:
            continue
        difference = tied_difference(read(copy), read(original), "it")
        if difference is not None:
            raise CheckpointError(
                f"'{where}': '{copy}' must be a copy of '{original}', but {difference}; set {_KEY} to 0 in config.json "
                "to import the model without these layers"
            )
        found.append(copy)
    return found
