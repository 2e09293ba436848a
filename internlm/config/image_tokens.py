"""How many tokens a picture has."""

from __future__ import annotations

from internlm.config.schema import Config
from internlm.config.schema.base import Section


def tokens_per_image(config: Config) -> int:
    """The placeholders of a picture: its patches, and one more where the tower's class token is kept.

    Args:
        config: whose data.image_size and data.patch_size are given.
    """
    assert config.data.image_size is not None and config.data.patch_size is not None
    num_patches = (config.data.image_size // config.data.patch_size) ** 2
    return num_patches + (tower_value(config, "mm_vision_select_feature") == "cls_patch")


def tower_value(config: Config, name: str) -> object:
    """A value of model.vit_cfg; None without one."""
    tower = config.model.vit_cfg
    return getattr(tower, name, None) if isinstance(tower, Section) else (tower or {}).get(name)
