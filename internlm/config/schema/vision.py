"""The sections `model.vit_cfg` and `model.vision_proj_cfg`: the vision tower of a LLaVA model, and its projector."""

from __future__ import annotations

from typing import Any, Literal

from internlm.config.schema.base import PathText, Section, key, no_effect


class VisionTowerConfig(Section):
    """The vision tower: a class of transformers whose hidden states become image features."""

    mm_vision_tower: PathText = key(
        None,
        "Folder of a CLIP or SigLIP model, or its name on the Hugging Face Hub; its weights are loaded when a run "
        "starts.",
        changes_outputs=True,
    )
    config: dict[str, Any] | None = key(
        None,
        "Content of the tower's config.json, with model_type 'clip_vision_model' or 'siglip_vision_model': the model "
        "can be built without the folder, whose config must be equal. Without a folder the tower starts with random "
        "weights.",
        changes_outputs=True,
    )
    mm_vision_select_layer: int = key(
        -2,
        "The hidden states that are image features: after so many layers, or counted from the last layer (-1).",
        changes_outputs=True,
    )
    mm_vision_select_feature: Literal["patch", "cls_patch"] = key(
        "patch", "Leave out the hidden state of the class token, or keep it in front.", changes_outputs=True
    )
    mm_projector_type: str | None = no_effect(
        None, "Kind of projector.", "it is read from model.vision_proj_cfg.mm_projector_type"
    )
    mm_use_im_start_end: bool = no_effect(
        False, "Tokens around a picture.", "they are tokens of the data, like all others"
    )
    mm_use_im_patch_token: bool = no_effect(
        True, "A token of its own for patches.", "the token is model.image_token_id"
    )


class VisionProjectorConfig(Section):
    """The projector: linear layers from the width of the vision tower to that of the language model."""

    mm_projector_type: str = key(
        "mlp2x_gelu",
        "linear; identity; or mlpNx_gelu, N linear layers with GELU between them.",
        pattern=r"^(linear|identity|mlp[1-9]\d*x_gelu)$",
        changes_outputs=True,
    )
    mm_hidden_size: int | None = key(
        None, "Width of the vision tower, which it must equal; None: that width.", ge=1, changes_outputs=False
    )
    hidden_size: int | None = key(
        None, "Width of the language model, which it must equal; None: that width.", ge=1, changes_outputs=False
    )
