"""What a run needs of its surroundings, checked before it begins: data, weights to start from, folders, packages.

One list of checks with two readers, the start of a run (on its main rank) and `--dry-run`. They look and write nothing,
and are quick enough for every start. `--dry-run` also builds the loaders as the start does, which reads the index of
every file.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from internlm.checkpoint.folder import find_checkpoints, resolve
from internlm.config.schema import Config
from internlm.convert.checkpoint_types import open_weights
from internlm.core.context.parallel_context import ParallelContext
from internlm.data.folder import find_train_files, find_valid_sets
from internlm.initialize.build import build_loader, build_valid_sets, is_left_open
from internlm.initialize.stages import build_meta_model
from internlm.initialize.tokenizers import data_tokenizer
from internlm.model.ops.registry import OpSettings, describe
from internlm.utils.errors import CheckpointError, ConfigError, DataError, UserError
from internlm.utils.optional_packages import why_unusable
from internlm.utils.storage import storage_path

Check = Callable[[Config, ParallelContext], list[str]]
"""Returns what the user should know, and raises a UserError for what the run would fail with."""


def check_surroundings(config: Config, context: ParallelContext) -> list[str]:
    """Run every check.

    Returns:
        One line on each thing that is not as asked, but without which the run goes on.

    Raises:
        UserError: the run would fail; with what every check found.
    """
    return _run_all(CHECKS, config, context)


def check_loaders(config: Config, context: ParallelContext) -> list[str]:
    """Build the loaders of a rank as the start of a run does, and compare tokenizers; nothing of it is kept.

    Returns:
        One line on each thing that is not as asked, but without which the run goes on.

    Raises:
        UserError: data is missing or malformed.
    """
    return _run_all((_train_loader, _valid_loaders, _data_tokenizer), config, context)


def _run_all(checks: tuple[Check, ...], config: Config, context: ParallelContext) -> list[str]:
    notices: list[str] = []
    errors: list[UserError] = []
    for check in checks:
        try:
            notices += check(config, context)
        except UserError as error:
            errors.append(error)
    if len(errors) > 1:
        texts = (error.mistakes if isinstance(error, ConfigError) else [str(error)] for error in errors)
        raise ConfigError(text for found in texts for text in found)
    if errors:
        raise errors[0]
    return notices


def _train_folder(config: Config, context: ParallelContext) -> list[str]:
    folder = config.data.train_folder
    if folder is not None:
        _require_local("data.train_folder", folder)
        find_train_files(folder)
    return []


def _valid_folder(config: Config, context: ParallelContext) -> list[str]:
    folder = config.data.valid_folder
    if folder is not None and config.data.valid_every > 0:
        _require_local("data.valid_folder", folder)
        find_valid_sets(folder)
    return []


def _train_loader(config: Config, context: ParallelContext) -> list[str]:
    build_loader(config, context)
    return []


def _valid_loaders(config: Config, context: ParallelContext) -> list[str]:
    build_valid_sets(config, context)
    return []


def _require_local(key: str, folder: str) -> None:
    """Training data is memory-mapped.

    Raises:
        DataError: the folder is in an object store.
    """
    if "://" in folder:
        raise DataError(f"{key} = {folder!r}: data is read from a local disk; copy the folder there, or mount it")


def _tokenizer(config: Config, context: ParallelContext) -> list[str]:
    """Training reads tokens: without their tokenizer, only texts cannot be made of what a model says."""
    path = config.data.tokenizer_path
    if path is None or Path(path).exists():
        return []
    return [f"data.tokenizer_path = {path!r}: no such tokenizer; training does without, `internlm generate` does not"]


def _data_tokenizer(config: Config, context: ParallelContext) -> list[str]:
    data_tokenizer(config)
    return []


def _weights(config: Config, context: ParallelContext) -> list[str]:
    """What `ckpt.load_ckpt_info` names is there, unless there is a checkpoint to resume."""
    info = config.ckpt.load_ckpt_info
    if info is None or info.path is None or is_left_open(info) or _resumes(config):
        return []
    path = storage_path(info.path)
    if info.ckpt_type == "internevo":
        resolve(path)
    else:
        open_weights(info.ckpt_type, path, build_meta_model(config))
    return []


def _resumes(config: Config) -> bool:
    ckpt = config.ckpt
    if not (ckpt.auto_resume and ckpt.enable_save_ckpt and ckpt.save_ckpt_folder):
        return False
    snapshots = storage_path(ckpt.snapshot_ckpt_folder) if ckpt.snapshot_ckpt_folder else None
    return bool(find_checkpoints(storage_path(ckpt.save_ckpt_folder), snapshots))


def _folders(config: Config, context: ParallelContext) -> list[str]:
    """Folders that the run writes to can be written, as far as looking tells."""
    ckpt = config.ckpt
    saved = (ckpt.save_ckpt_folder, ckpt.snapshot_ckpt_folder) if ckpt.enable_save_ckpt else ()
    for folder in filter(None, saved):
        path = storage_path(folder)
        reason = why_not_writable(path.local) if path.is_local else None
        if reason is not None:
            raise CheckpointError(f"checkpoints cannot be saved to '{path}': {reason}")
        if not path.is_local:
            path.names()
    if ckpt.stop_file_path is not None:
        path = storage_path(ckpt.stop_file_path)
        reason = why_not_writable(path.local.parent)
        if reason is not None:
            raise ConfigError(f"ckpt.stop_file_path = {ckpt.stop_file_path!r} cannot be written: {reason}")
    return []


def why_not_writable(folder: Path) -> str | None:
    """Why no file can be made in a local folder, which may have to be made first; None when one can."""
    folder = folder.absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists() or path.is_symlink())
    if not there.is_dir():
        return f"'{there}' is a file where a folder should be"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"no permission to write to '{there}'"
    return None


def _packages(config: Config, context: ParallelContext) -> list[str]:
    describe(context.device, OpSettings.of(config.model, use_float8=config.float8.enable_float8_linear))
    reason = why_unusable("torch.utils.tensorboard", "SummaryWriter") if config.enable_tb else None
    return [f"TensorBoard is off: {reason} (pip install tensorboard, or set enable_tb = False)"] if reason else []


CHECKS: tuple[Check, ...] = (_train_folder, _valid_folder, _tokenizer, _weights, _folders, _packages)
