"""Builds the checkpoint manager and loads what a run starts from, both from the `ckpt` section."""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import partial

from internlm.checkpoint.data_tokenizer import DATA_TOKENIZER, KnownTokenizer
from internlm.checkpoint.manager import CheckpointManager
from internlm.checkpoint.manifest import Manifest
from internlm.checkpoint.reading import CONFIG_FILE
from internlm.checkpoint.save_folder import resolve
from internlm.config.schema import Config
from internlm.config.schema.ckpt import LoadCkptInfo
from internlm.convert.checkpoint_types import open_weights, trained_as
from internlm.convert.to_hf import export_next_to
from internlm.core.trainer import Trainer
from internlm.initialize.build_schedules import build_schedules
from internlm.initialize.model_changes import check_same_function, compare_configs, saved_config
from internlm.initialize.position_changes import log_position_changes
from internlm.initialize.tokenizers import compare_with_checkpoint
from internlm.initialize.valid_sets import check_held_out
from internlm.initialize.vision_tower import load_decoder_or_all, load_tower
from internlm.solver.optimizer.nonfinite import nonfinite_states, nonfinite_weights
from internlm.utils.errors import CheckpointError
from internlm.utils.logging import get_logger
from internlm.utils.storage import StoragePath, storage_path

logger = get_logger(__name__)


def build_manager(config: Config, config_text: str) -> CheckpointManager:
    """Build the checkpoint manager described by the `ckpt` section."""
    ckpt = config.ckpt
    return CheckpointManager(
        ckpt.save_ckpt_folder or None,
        files={CONFIG_FILE: json.dumps(config.model_dump(mode="json"), indent=1), "config_file.py": config_text},
        snapshot_folder=ckpt.snapshot_ckpt_folder or None,
        keep_latest=ckpt.keep_latest,
        async_save=ckpt.enable_save_ckpt and ckpt.saves_in_background,
        after_save=export_next_to if ckpt.enable_internevo2hf_ckpt else None,
    )


def load_checkpoint(config: Config, manager: CheckpointManager, trainer: Trainer) -> None:
    """Resume, load `ckpt.load_ckpt_info`, or start from scratch, and log which of these happened.

    Raises:
        CheckpointError: a checkpoint is missing, damaged or incompatible, or its model computes another function.
    """
    info = config.ckpt.load_ckpt_info
    check = partial(check_checkpoint, config)
    # A run only resumes from a folder that it also saves to.
    resumes = config.ckpt.auto_resume and config.ckpt.enable_save_ckpt
    found = manager.resume(trainer, check) if resumes else None
    if found is not None:
        _keep_files(config, manager, found.path)
        logger.info("resuming at step %d of %d from %s", trainer.state.step, trainer.total_steps, found.path)
        check_finite(trainer, found.path)
    elif info is not None and info.path is not None and not is_left_open(info):
        path = storage_path(info.path)
        if info.ckpt_type == "internevo":
            path = resolve(path)
        _keep_files(config, manager, path)
        if info.ckpt_type == "internevo":
            if "model" not in info.content:
                load_tower(config, trainer)
            manager.load(trainer, path, info.content, strict=info.strict, check=check)
        else:
            weights = open_weights(info.ckpt_type, path, trainer.engine.chunks[0])
            check_foreign_weights(config, info, path)
            load_tower(config, trainer)
            load_decoder_or_all(config, trainer, weights, f"'{path}'", strict=info.strict)
            trainer.notify_checkpoint_loaded(path)
        logger.info("starting at step %d with %s loaded from %s", trainer.state.step, ", ".join(info.content), path)
        check_finite(trainer, path)
    else:
        off = "enable_save_ckpt" if config.ckpt.auto_resume else "auto_resume"
        why = f"no complete checkpoint in {manager.save_folder}" if resumes else f"{off} is off"
        logger.info("starting from scratch (%s)", why)
        load_tower(config, trainer)
    if config.ckpt.enable_save_ckpt:
        manager.warn_of_later(trainer.context, trainer.state.step)


def check_finite(trainer: Trainer, path: StoragePath) -> None:
    """Refuse a loaded checkpoint that contains an inf or NaN, which training would spread to every weight; collective.

    Raises:
        CheckpointError: names the first such tensor, its layer and rank.
    """
    optimizer = trainer.engine.optimizer
    found = nonfinite_weights(optimizer) or nonfinite_states(optimizer)
    if found:
        raise CheckpointError(
            f"the checkpoint '{path}' has an inf or NaN in {found[0]}"
            + (f" and in {len(found) - 1} more tensors" if len(found) > 1 else "")
            + ": training cannot continue from it. Name an earlier one in ckpt.load_ckpt_info, or remove this one"
        )


def check_checkpoint(config: Config, path: StoragePath, manifest: Manifest, contents: Collection[str]) -> None:
    """Compare the config with that of a native checkpoint whose `contents` are to be loaded.

    Raises:
        CheckpointError: the model computes another function, or has been trained on documents that this run holds out.
    """
    saved = saved_config(path)
    if saved is not None:
        next_lr = (lambda config: build_schedules(config)[0].lr(manifest.step)) if "scheduler" in contents else None
        compare_configs(saved, config, f"the checkpoint '{path}'", contents, next_lr)
        check_held_out(saved, config, f"the checkpoint '{path}'")


def check_foreign_weights(config: Config, info: LoadCkptInfo, path: StoragePath) -> None:
    """Compare the config with that of weights in another format, if they have one.

    Raises:
        CheckpointError: the model computes another function.
    """
    trained = trained_as(info.ckpt_type, path, config)
    if trained is not None:
        check_same_function(trained, config, f"'{path}'", translated=True)
        log_position_changes(trained, config, f"'{path}'")


def is_left_open(info: LoadCkptInfo) -> bool:
    """Whether the path is the unedited placeholder of an example config, and no local folder has that name.

    Object stores are not queried.
    """
    assert info.path is not None
    path = storage_path(info.path)
    return info.is_placeholder and not (path.is_local and path.exists())


def _keep_files(config: Config, manager: CheckpointManager, path: StoragePath) -> None:
    """Copy the tokenizer files of the checkpoint at `path` into the checkpoints of this run."""
    content = manager.files.get(DATA_TOKENIZER)
    known = None if content is None else KnownTokenizer.from_json(content)
    manager.files |= compare_with_checkpoint(config, path, known)
