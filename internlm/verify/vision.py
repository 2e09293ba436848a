"""Small vision towers, and where the pictures of a case are.

Shapes: P placeholders of a picture, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from internlm.config.image_tokens import tokens_per_image
from internlm.config.schema import Config
from internlm.data.packing.image_placeholders import NO_FEATURE
from internlm.model.llava.vision_tower import tower_config

IMAGE_SIZE, PATCH_SIZE = 8, 4
"""Pixels of a side: four patches."""

TOWER_SIZES: Mapping[str, int] = {
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
}
"""Sizes of the config of a small tower, which differ from those of small decoders."""

TOWERS: Mapping[str, tuple[str, str]] = {
    "clip": ("clip_vision_model", "patch"),
    "clip_with_class": ("clip_vision_model", "cls_patch"),
    "siglip": ("siglip_vision_model", "patch"),
}
"""Name -> class of the tower and `mm_vision_select_feature`."""

PICTURES_PER_DOCUMENT = (0, 2, 0, 0, 1)
"""Pictures in each document of a micro-batch that has room for them, by micro-batch number modulo 5: there are steps
in which a rank, or every rank, has none."""


def vision_keys(tower: str, projector: str, hidden_size: int) -> dict[str, Any]:
    """The config keys, by dotted path, of a small tower of two layers, of which the last is not computed.

    Args:
        tower: a name of `TOWERS`.
        projector: `model.vision_proj_cfg.mm_projector_type`.
        hidden_size: of the decoder.
    """
    model_type, feature = TOWERS[tower]
    values = {**TOWER_SIZES, "model_type": model_type, "num_hidden_layers": 2}
    if projector == "identity":
        values["hidden_size"] = hidden_size
    return {
        "model.vit_cfg": {"config": values, "mm_vision_select_feature": feature},
        "model.vision_proj_cfg": {"mm_projector_type": projector},
        "model.image_token_id": 200000,
        "data.is_multimodal": True,
        "data.image_size": IMAGE_SIZE,
        "data.patch_size": PATCH_SIZE,
    }


def small_vision_keys(config: Config, hidden_size: int, vocab_size: int) -> dict[str, Any]:
    """The config keys, by dotted path, of a small tower of the same class, with a small projector of the same kind.

    The selected hidden state is the last one, or one before it, as it was; it stays counted from the same end. A
    placeholder outside of the vocabulary stays there, others become the last token of it.

    Args:
        config: of a model with a vision tower.
        hidden_size: of the small decoder, which is the width of a tower whose projector is the identity.
        vocab_size: of the small decoder.
    """
    model = config.model
    assert model.vit_cfg is not None and model.vision_proj_cfg is not None and model.image_token_id is not None
    tower, selected = tower_config(model.vit_cfg), model.vit_cfg.mm_vision_select_layer
    layers = tower.num_hidden_layers
    computed = selected if selected >= 0 else layers + 1 + selected
    small_computed = min(computed, 2)
    small_layers = max(1, small_computed + min(layers - computed, 1))
    values = {**tower.to_diff_dict(), **TOWER_SIZES, "num_hidden_layers": small_layers, "attention_dropout": 0.0}
    if model.vision_proj_cfg.mm_projector_type == "identity":
        values["hidden_size"] = hidden_size
    keys = {
        "model.vit_cfg.config": values,
        "model.vit_cfg.mm_vision_tower": None,
        "model.vit_cfg.mm_vision_select_layer": small_computed - (small_layers + 1 if selected < 0 else 0),
        "model.vision_proj_cfg.mm_hidden_size": None,
        "model.vision_proj_cfg.hidden_size": None,
        "model.image_token_id": model.image_token_id if model.image_token_id >= model.vocab_size else vocab_size - 1,
    }
    return keys | ({"data.image_size": IMAGE_SIZE, "data.patch_size": PATCH_SIZE} if config.data.is_multimodal else {})


def num_vision_layers(config: Config) -> int:
    """Layers between pixels and the decoder, with the projector as one of them; 0 for a model without pictures."""
    section = config.model.vit_cfg
    if config.model_type != "LLAVA" or section is None:
        return 0
    return int(tower_config(section).num_hidden_layers) + 1


def draw_pictures(
    config: Config, index: int, documents: Sequence[tuple[int, int]], generator: torch.Generator
) -> list[int]:
    """Where pictures begin in a micro-batch; none without `data.is_multimodal`.

    A document with one picture has it anywhere. Of two, the first is at the start of the document.

    Args:
        config: of the run.
        index: number of the micro-batch.
        documents: index of the first token and number of tokens, for each document.
        generator: of random numbers.
    """
    if not config.data.is_multimodal:
        return []
    wanted, size = PICTURES_PER_DOCUMENT[index % len(PICTURES_PER_DOCUMENT)], tokens_per_image(config)
    starts = []
    for first, length in documents:
        number = min(wanted, (length - 1) // size)
        if number == 0:
            continue
        if number == 2:
            starts.append(first)
            first, length = first + size, length - size
        starts.append(first + int(torch.randint(0, length - size, (), generator=generator)))
    return starts


def feature_indices(config: Config, starts: Sequence[int], num_tokens: int) -> Tensor:
    """The index of the image feature of each token, int64 `[num_tokens]`, or `NO_FEATURE`, for pictures at `starts`."""
    size = tokens_per_image(config)
    indices = torch.full((num_tokens,), NO_FEATURE)
    for number, start in enumerate(starts):
        indices[start : start + size] = torch.arange(number * size, (number + 1) * size)
    return indices


def draw_pixels(num_pictures: int, generator: torch.Generator) -> Tensor | None:
    """Random pictures, float32 `[num_pictures, 3, H, W]`; None if there are none."""
    return torch.randn(num_pictures, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator) if num_pictures else None
