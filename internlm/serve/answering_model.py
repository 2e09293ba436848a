"""Loads the model that a path means: a checkpoint, the folder of a run, or a Hugging Face folder."""

from __future__ import annotations

import torch
from torch import nn

from internlm.checkpoint.load_model import load_model_for_inference
from internlm.checkpoint.manifest import manifest_name
from internlm.checkpoint.run_state import MODEL_PREFIX, model_tensors
from internlm.checkpoint.save_folder import find_checkpoints, resolve
from internlm.checkpoint.weight_source import finite
from internlm.config.schema import Config
from internlm.convert.from_hf import read_hf_folder
from internlm.convert.hf_folder import CONFIG
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.parallelize import parallelize
from internlm.model.registry import build_model
from internlm.monitor.run_file import FILE_NAME as RUN_FILE
from internlm.monitor.run_file import read_run_file
from internlm.utils.errors import ConfigError
from internlm.utils.logging import get_logger
from internlm.utils.storage import StoragePath, storage_path

logger = get_logger(__name__)


def load_answering_model(path: str, device: torch.device) -> tuple[nn.Module, Config, StoragePath]:
    """The model of a path, in evaluation mode, the config it has, and the folder that its weights are in.

    Args:
        path: a checkpoint, a folder of them (newest), the folder of a run (newest of its checkpoints), or a Hugging
            Face folder of a family that `internlm convert from-hf` reads.
        device: of the weights.

    Raises:
        CheckpointError: there is no complete checkpoint, or it is damaged.
        ConfigError: the family or a feature of a Hugging Face folder is not supported, or a run saves no checkpoints.
        DataError: run.json cannot be read.
    """
    place = storage_path(path)
    if manifest_name(place) is None and (place / CONFIG).is_file() and not find_checkpoints(place):
        return *_load_hf_folder(place, device), place
    folder = resolve(_saves_of(place))
    return *load_model_for_inference(folder, device), folder


def _saves_of(place: StoragePath) -> StoragePath:
    """The folder of a run's checkpoints; any other folder itself."""
    is_run = place.is_local and (place / RUN_FILE).is_file() and manifest_name(place) is None
    if not is_run or find_checkpoints(place):
        return place
    ckpt = read_run_file(place.local).config.ckpt
    if not ckpt.enable_save_ckpt or ckpt.save_ckpt_folder is None:
        raise ConfigError(f"the run in '{place}' saves no checkpoints (ckpt.enable_save_ckpt, ckpt.save_ckpt_folder)")
    logger.info("%s: its checkpoints are in %s", place, ckpt.save_ckpt_folder)
    return storage_path(str(ckpt.save_ckpt_folder))


def _load_hf_folder(place: StoragePath, device: torch.device) -> tuple[nn.Module, Config]:
    tokenizer_path = str(place.local.absolute()) if place.is_local else None
    imported = read_hf_folder(place, tokenizer_path=tokenizer_path)
    # Layers that predict later tokens are for training.
    section = imported.config.model.model_copy(update={"num_nextn_predict_layers": 0})
    config = imported.config.model_copy(update={"JOB_NAME": place.name, "model": section})
    with torch.device("meta"):
        model = build_model(config.model_type, section)
    parallelize(model, ParallelContext.create(device=device), seed=config.seed)
    with torch.no_grad():
        for key, boxed in model_tensors(model).items():
            name = key.removeprefix(MODEL_PREFIX)
            whole = imported.weights.read(name)
            for box, piece in boxed.pieces:
                piece.copy_(finite(whole[box.global_slices()], name, f"'{place}'", piece.dtype))
    return model.eval(), config
