"""How many tokens a picture has."""

from __future__ import annotations

from internlm.config.schema import Config


def tokens_per_image(config: Config) -> int:
    """The placeholders of a picture: its patches, and one more where the tower's class token is kept.

    Args:
        config: whose data.image_size and data.patch_size are given.
    """
    assert config.data.image_size is not None and config.data.patch_size is not None
    tower = config.model.vit_cfg
    keeps_class_token = tower is not None and tower.mm_vision_select_feature == "cls_patch"
    return (config.data.image_size // config.data.patch_size) ** 2 + keeps_class_token
