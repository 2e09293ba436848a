"""What a run needs of its surroundings, checked before it begins: data, weights to start from, folders, packages.

One list of checks with two readers, the start of a run (on its main rank) and `--dry-run`. They look and write nothing,
and are quick enough for every start. `--dry-run` also does what the start does itself, later: it builds the loaders,
which reads the index of every file, and compares the config with the checkpoint that it would begin from.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from internlm.checkpoint.manager import CheckpointManager
from internlm.checkpoint.manifest import WHOLE_RUN, Manifest, check_contents, read_manifest
from internlm.checkpoint.save_folder import FoundCheckpoint, find_checkpoints, resolve
from internlm.config.schema import Config
from internlm.convert.checkpoint_types import open_weights
from internlm.core.context.parallel_context import ParallelContext
from internlm.data.documents.folders import find_train_files, find_valid_sets
from internlm.initialize.build_data import build_loader, build_valid_sets, file_format
from internlm.initialize.load_checkpoint import check_checkpoint, check_foreign_weights, is_left_open
from internlm.initialize.stages import build_meta_model
from internlm.initialize.tokenizers import compare_with_checkpoint, data_tokenizer
from internlm.initialize.user_hooks import build_user_hooks
from internlm.model.ops.implementations import OpSettings, describe
from internlm.utils.errors import CheckpointError, ConfigError, DataError, UserError
from internlm.utils.optional_packages import why_unusable
from internlm.utils.storage import StoragePath, storage_path

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


def rehearse_start(config: Config, context: ParallelContext) -> list[str]:
    """What the start of a run checks itself: loaders, tokenizers, the checkpoint it begins from, where it saves.

    Checksums and tensors are not read. Nothing of it is kept.

    Returns:
        One line on each thing that is not as asked, but without which the run goes on.

    Raises:
        UserError: data is missing or malformed, a checkpoint does not fit, or saving would destroy what is not ours.
    """
    return _run_all((_train_loader, _valid_loaders, _data_tokenizer, _checkpoint, _room), config, context)


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
        # One cause may stop several checks.
        raise ConfigError(dict.fromkeys(text for found in texts for text in found))
    if errors:
        raise errors[0]
    return notices


def _train_folder(config: Config, context: ParallelContext) -> list[str]:
    folder = config.data.train_folder
    if folder is None:
        return ["the run trains on random tokens, for trials of speed: data.train_folder is None"]
    _require_local("data.train_folder", folder)
    find_train_files(folder, file_format(config))
    return []


def _valid_folder(config: Config, context: ParallelContext) -> list[str]:
    folder = config.data.valid_folder
    if folder is not None and config.data.valid_every > 0:
        _require_local("data.valid_folder", folder)
        find_valid_sets(folder, file_format(config))
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
    known = data_tokenizer(config)
    begins_from = _begins_from(config)
    if begins_from is not None:
        compare_with_checkpoint(config, begins_from[0], known)
    return []


def _checkpoint(config: Config, context: ParallelContext) -> list[str]:
    """The config is that of the checkpoint, or differs from it as it may."""
    begins_from, info = _begins_from(config), config.ckpt.load_ckpt_info
    if begins_from is None:
        return []
    path, mark, contents = begins_from
    if mark is not None:
        check_contents(path, mark, contents)
        check_checkpoint(config, path, mark, contents)
        return [f"the run would go on from '{path}'" if _resumes(config) else f"the run would begin from '{path}'"]
    assert info is not None
    check_foreign_weights(config, info, path)
    return [f"the run would begin with the weights of '{path}'"]


def _room(config: Config, context: ParallelContext) -> list[str]:
    """Nothing of others lies where the run saves."""
    ckpt = config.ckpt
    if not (ckpt.enable_save_ckpt and ckpt.save_ckpt_folder):
        return []
    begins_from = _begins_from(config)
    # As many steps are behind the run as the counters say that it takes over.
    mark = begins_from[1] if begins_from is not None and "scheduler" in begins_from[2] else None
    manager = CheckpointManager(
        ckpt.save_ckpt_folder,
        snapshot_folder=ckpt.snapshot_ckpt_folder or None,
        after_save=(lambda _: None) if ckpt.enable_internevo2hf_ckpt else None,
    )
    first, last = (mark.step if mark is not None else 0) + 1, config.data.total_steps
    manager.check_room(context, first, last, snapshots=ckpt.oss_snapshot_freq is not None)
    return []


def _begins_from(config: Config) -> tuple[StoragePath, Manifest | None, tuple[str, ...]] | None:
    """The checkpoint or weights that the run begins from, the mark of one of ours, and what is loaded of it.

    Raises:
        CheckpointError: there is none where the config says, or only such as cannot be read.
    """
    refused: list[str] = []
    found = _to_resume(config)
    for checkpoint in reversed(found):
        try:
            mark = read_manifest(checkpoint.path)
        except CheckpointError as error:
            refused.append(str(error))
            continue
        if mark is not None:
            return checkpoint.path, mark, mark.contents
    if found:
        raise CheckpointError(
            f"ckpt.auto_resume: no checkpoint in '{config.ckpt.save_ckpt_folder}' can be read: {'; '.join(refused)}"
        )
    info = config.ckpt.load_ckpt_info
    if info is None or info.path is None or is_left_open(info):
        return None
    path = storage_path(info.path)
    if info.ckpt_type != "internevo":
        return path, None, tuple(info.content)
    path = resolve(path)
    return path, read_manifest(path), WHOLE_RUN if "all" in info.content else tuple(info.content)


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
    return bool(_to_resume(config))


def _to_resume(config: Config) -> list[FoundCheckpoint]:
    ckpt = config.ckpt
    if not (ckpt.auto_resume and ckpt.enable_save_ckpt and ckpt.save_ckpt_folder):
        return []
    snapshots = storage_path(ckpt.snapshot_ckpt_folder) if ckpt.snapshot_ckpt_folder else None
    return find_checkpoints(storage_path(ckpt.save_ckpt_folder), snapshots)


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


def _hooks(config: Config, context: ParallelContext) -> list[str]:
    build_user_hooks(config.hooks)
    return []


CHECKS: tuple[Check, ...] = (_train_folder, _valid_folder, _tokenizer, _weights, _folders, _packages, _hooks)
