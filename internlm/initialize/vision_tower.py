"""Loads the weights of a vision tower when a run starts."""

from __future__ import annotations

from internlm.checkpoint.run_state import load_weights
from internlm.checkpoint.weight_source import WeightSource
from internlm.config.schema import Config
from internlm.convert.hf_folder import HfFolder
from internlm.convert.llava_folder import TowerWeights
from internlm.core.trainer import Trainer
from internlm.model.llava.model import Llava
from internlm.model.llava.vision_tower import VisionTower, folder_config, tower_folder
from internlm.utils.errors import ConfigError
from internlm.utils.logging import get_logger
from internlm.utils.storage import storage_path

logger = get_logger(__name__)

_PARTS = ("vision_tower.", "vision_proj.")
"""Beginnings of the names of weights that a language model alone lacks."""


def load_tower(config: Config, trainer: Trainer) -> None:
    """Load the tower of `model.vit_cfg.mm_vision_tower`, if the model has one; collective.

    Raises:
        ConfigError: the folder does not exist, cannot be downloaded, or has another tower than the config states.
        CheckpointError: its weights are missing, or do not fit.
    """
    model, section = trainer.engine.chunks[0], config.model.vit_cfg
    if not isinstance(model, Llava) or section is None:
        return
    if section.mm_vision_tower is None:
        logger.warning("the vision tower starts with random weights: model.vit_cfg.config names no folder")
        return
    place = tower_folder(section.mm_vision_tower)
    stated, stored = model.vision.function, VisionTower(folder_config(place), section).function
    differing = [name for name in stored if stored[name] != stated.get(name)]
    if differing:
        lines = [f"{name}: {stored[name]!r} in the folder, {stated.get(name)!r} in the config" for name in differing]
        raise ConfigError(f"model.vit_cfg.config differs from that of '{place}':\n  " + "\n  ".join(lines))
    path = storage_path(str(place))
    folder = HfFolder(path)
    load_weights(trainer, TowerWeights(folder, model), f"'{path}'", needs=lambda name: name.startswith(_PARTS[0]))
    files = sorted({entry.file for entry in folder.entries.values()})
    logger.info("the vision tower is loaded from %s (%s)", path, ", ".join(files))


def load_decoder_or_all(config: Config, trainer: Trainer, weights: WeightSource, what: str, *, strict: bool) -> None:
    """Load weights of another format; those of a language model go into the decoder of a LLaVA. Collective.

    Raises:
        CheckpointError: see `load_weights`.
    """
    if config.model_type != "LLAVA" or any(name.startswith(_PARTS) for name in weights.names()):
        load_weights(trainer, weights, what, strict=strict)
        return
    load_weights(trainer, weights, what, strict=strict, needs=lambda name: not name.startswith(_PARTS))
    logger.info("%s is a language model without vision; the projector keeps its initial values", what)
