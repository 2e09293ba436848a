"""Vision towers: the CLIP and SigLIP classes of transformers, of which one hidden state is used.

Shapes: N pictures, H x W pixels, P features of a picture, v width of the tower.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from internlm.model.hf_class.meta_build import build_on_meta
from internlm.model.recompute import SavePolicy, recomputed
from internlm.utils.errors import ConfigError, DataError
from internlm.utils.optional_packages import why_unusable

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from internlm.config.schema.vision import VisionTowerConfig

TOWER_CLASSES = {"clip_vision_model": "CLIPVisionModel", "siglip_vision_model": "SiglipVisionModel"}
"""`model_type` of a config.json -> class of transformers."""

_WITH_TEXT_MODEL = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
"""`model_type` of a config.json that also describes a text model -> that of its vision tower."""


def tower_config(section: VisionTowerConfig) -> PretrainedConfig:
    """The configuration of the tower that `model.vit_cfg` names.

    Raises:
        ConfigError: transformers is missing, the folder has no config.json, or the class is not supported.
    """
    missing = why_unusable("transformers")
    if missing is not None:
        raise ConfigError(f"model.vit_cfg: vision towers are classes of transformers: {missing}")
    if section.config is not None:
        return config_from_values(section.config, "model.vit_cfg.config")
    if section.mm_vision_tower is None:
        raise ConfigError(
            "model.vit_cfg.mm_vision_tower = None: name the folder of a CLIP or SigLIP model, or give "
            "model.vit_cfg.config"
        )
    return folder_config(tower_folder(section.mm_vision_tower))


def folder_config(folder: Path) -> PretrainedConfig:
    """The configuration of the tower in a folder.

    Raises:
        ConfigError: the folder has no config.json, or the class is not supported.
    """
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"model.vit_cfg.mm_vision_tower: '{path.parent}' has no config.json") from None
    except ValueError as error:
        raise ConfigError(f"model.vit_cfg.mm_vision_tower: {path}: not JSON: {error}") from None
    return config_from_values(values, str(path))


def config_from_values(values: dict[str, Any], place: str) -> PretrainedConfig:
    """The configuration of a tower from the content of a config.json.

    Args:
        values: of the tower, or of a CLIP or SigLIP model that contains it.
        place: for messages.

    Raises:
        ConfigError: the class is not supported, or a value is invalid.
    """
    import transformers

    if not isinstance(values, dict):
        raise ConfigError(f"{place}: must be a JSON object, the configuration of a CLIP or SigLIP model")
    kind = values.get("model_type")
    if kind in _WITH_TEXT_MODEL:
        kind, values = _WITH_TEXT_MODEL[kind], values.get("vision_config") or {}
    if kind not in TOWER_CLASSES:
        raise ConfigError(
            f"{place}: a vision tower of model_type {kind!r} is not supported; supported: {', '.join(TOWER_CLASSES)}"
        )
    cls = getattr(transformers, TOWER_CLASSES[kind].replace("Model", "Config"))
    try:
        config = cls.from_dict({**values, "model_type": kind})
    except Exception as error:
        raise ConfigError(f"{place}: transformers refuses it: {error}") from error
    config._attn_implementation = "sdpa"
    return cast("PretrainedConfig", config)


def tower_folder(name: str) -> Path:
    """The folder that has a tower; one of the Hugging Face Hub is downloaded once.

    Raises:
        ConfigError: there is no such folder, and it cannot be downloaded.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ConfigError(f"model.vit_cfg.mm_vision_tower: there is no folder '{name}'")
    missing = why_unusable("huggingface_hub")
    if missing is not None:
        raise ConfigError(f"model.vit_cfg.mm_vision_tower: there is no folder '{name}', and {missing} to download it")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:
        raise ConfigError(
            f"model.vit_cfg.mm_vision_tower: there is no folder '{name}', and the model of that name could not be "
            f"downloaded: {error}"
        ) from error


class VisionTower:
    """Computes image features with the modules of a tower. Holds no parameters: the tower is a module of its model.

    Args:
        config: of the tower, from `tower_config`.
        section: `model.vit_cfg`.

    Attributes:
        config: of the tower.
        width: v.
        num_layers: computed layers, up to the selected hidden state.
        has_class_token: its first hidden state is of no patch.
        tokens_per_image: P.
        save_policies: of the computed layers, see `internlm.model.recompute`; by default, none is recomputed.

    Raises:
        ConfigError: the tower does not have the selected layer, or no class token although it is selected.
    """

    def __init__(self, config: PretrainedConfig, section: VisionTowerConfig) -> None:
        self.config = config
        self.width: int = config.hidden_size
        layers, selected = config.num_hidden_layers, section.mm_vision_select_layer
        self.num_layers = selected if selected >= 0 else layers + 1 + selected
        if not 0 <= self.num_layers <= layers:
            raise ConfigError(
                f"model.vit_cfg.mm_vision_select_layer = {selected}: the vision tower has {layers} layers, so it must "
                f"be between {-layers - 1} and {layers}"
            )
        everything: tuple[SavePolicy, ...] = ("everything",)
        self.save_policies = everything * self.num_layers
        self.has_class_token: bool = config.model_type == "clip_vision_model"
        keeps_class = section.mm_vision_select_feature == "cls_patch"
        if keeps_class and not self.has_class_token:
            raise ConfigError(
                "model.vit_cfg.mm_vision_select_feature = 'cls_patch': a SigLIP tower has no class token; set 'patch'"
            )
        self._first = 1 if self.has_class_token and not keeps_class else 0
        num_patches = (config.image_size // config.patch_size) ** 2
        self.tokens_per_image: int = num_patches + self.has_class_token - self._first

    def build(self, dtype: torch.dtype) -> nn.Module:
        """The tower with parameters on the meta device; those that no feature depends on are not trained.

        Raises:
            ConfigError: transformers refuses its configuration.
        """
        import transformers

        cls = getattr(transformers, TOWER_CLASSES[self.config.model_type])
        try:
            tower: nn.Module = build_on_meta(lambda: cls(self.config), dtype)
        except Exception as error:  # each class raises its own kinds
            raise ConfigError(
                f"model.vit_cfg: {cls.__name__} of transformers cannot be built from its configuration: "
                f"{type(error).__name__}: {error}"
            ) from error
        for name, parameter in tower.named_parameters():
            if not self._is_used(name):
                parameter.requires_grad_(False)
        return tower

    def recompute(self, share: float, policy: SavePolicy) -> None:
        """Recompute a share of the computed layers in backward, from the first, where they are trained."""
        num_recomputed = int(self.num_layers * share)
        self.save_policies = (policy,) * num_recomputed + self.save_policies[num_recomputed:]

    def features(self, tower: nn.Module, images: Tensor) -> Tensor:
        """Pictures `[N, 3, H, W]` -> hidden states of the selected layer, `[N, P, v]`.

        Layers behind the selected one are not computed.

        Raises:
            DataError: the pictures do not have the size that the tower takes.
        """
        size = self.config.image_size
        if images.shape[-2:] != (size, size):
            raise DataError(
                f"pictures have {images.shape[-2]} x {images.shape[-1]} pixels, but the vision tower takes {size} x "
                f"{size}: set data.image_size = {size}"
            )
        parts = cast(Any, tower)
        hidden: Tensor = parts.embeddings(images)
        if hasattr(tower, "pre_layrnorm"):
            hidden = parts.pre_layrnorm(hidden)
        for layer, policy in zip(parts.encoder.layers, self.save_policies, strict=False):
            is_trained = any(parameter.requires_grad for parameter in layer.parameters())
            hidden = recomputed(layer, policy if is_trained else "everything")(hidden, None)
        return hidden[:, self._first :]

    @property
    def function(self) -> dict[str, Any]:
        """What determines the features of a picture, besides the weights."""
        values = self.config.to_dict()
        ignored = ("dtype", "torch_dtype", "transformers_version", "architectures", "_name_or_path")
        kept = {f"vision tower: {name}": value for name, value in values.items() if name not in ignored}
        return {**kept, "selected layer": self.num_layers, "first selected token": self._first}

    def blank(self, device: torch.device) -> Tensor:
        """A picture without content, float `[1, 3, H, W]`."""
        size = self.config.image_size
        return torch.zeros(1, 3, size, size, device=device)

    def _is_used(self, name: str) -> bool:
        """Whether the features depend on a parameter of the tower."""
        if name.startswith("encoder.layers."):
            return int(name.split(".")[2]) < self.num_layers
        return name.startswith(("embeddings.", "pre_layrnorm."))
