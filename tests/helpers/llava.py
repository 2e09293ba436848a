"""Small LLaVA models, and micro-batches with pictures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from helpers.tiny import VOCAB, tiny_config
from internlm.config.schema import ModelConfig
from internlm.data.batch import IGNORE_INDEX, MicroBatch
from internlm.data.packing.image_placeholders import IMAGE_FEATURES, image_feature_indices

IMAGE_TOKEN = 200000

CLIP: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "projection_dim": 12,
}
"""Four patches and a class token."""

SIGLIP: dict[str, Any] = {**CLIP, "model_type": "siglip_vision_model", "vision_use_head": True}


def llava_config(tower: dict[str, Any] | None = None, select: str = "patch", **changes: Any) -> ModelConfig:
    """A tiny decoder with a tiny vision tower."""
    vision = {"config": tower or CLIP, "mm_vision_select_feature": select}
    return tiny_config(image_token_id=IMAGE_TOKEN, vit_cfg=vision, vision_proj_cfg={}, **changes)


def with_pictures(micro: MicroBatch, seed: int, starts: tuple[int, ...], tokens_per_image: int = 4) -> MicroBatch:
    """A micro-batch in which pictures begin at these tokens; their placeholders have no label."""
    ids, labels = micro.input_ids.clone(), micro.labels.clone()
    for start in starts:
        ids[0, start : start + tokens_per_image] = IMAGE_TOKEN
    labels[0, :-1][ids[0, 1:] == IMAGE_TOKEN] = IGNORE_INDEX
    labels[ids == IMAGE_TOKEN] = IGNORE_INDEX
    indices = image_feature_indices(ids, IMAGE_TOKEN, tokens_per_image, len(starts))
    images = torch.randn(len(starts), 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return replace(
        micro,
        input_ids=ids.masked_fill(ids == IMAGE_TOKEN, 0),
        labels=labels,
        num_valid_tokens=int((labels != IGNORE_INDEX).sum()),
        extra={IMAGE_FEATURES: indices},
        images=images if starts else None,
    )


__all__ = ["CLIP", "IMAGE_TOKEN", "SIGLIP", "VOCAB", "llava_config", "with_pictures"]
