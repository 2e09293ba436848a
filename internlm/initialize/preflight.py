"""Checks of a run's environment before it starts: data, initial weights, folders, packages, hooks.

The checks are shared by the start of a run (on its main rank) and `--dry-run`. They leave nothing behind and are fast
enough for every start. `--dry-run` also rehearses later steps of the start: it builds the loaders, which reads the
index of every file, and compares the config with the checkpoint that the run would start from.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from internlm.checkpoint.manager import CheckpointManager
from internlm.checkpoint.manifest import WHOLE_RUN, Manifest, check_contents, read_manifest
from internlm.checkpoint.save_folder import FoundCheckpoint, find_checkpoints, resolve
from internlm.config.schema import Config
from internlm.convert.checkpoint_types import open_weights
from internlm.core.context.parallel_context import ParallelContext
from internlm.data.documents.folders import find_train_files
from internlm.data.rows.hub_datasets import locate_dataset
from internlm.data.rows.row_folders import find_row_files
from internlm.data.tokenize.text_tokenizer import load_tokenizer
from internlm.initialize.build_data import build_loader, build_replay_stream, build_valid_sets
from internlm.initialize.data_folders import train_folder
from internlm.initialize.file_formats import file_format
from internlm.initialize.hf_class_checks import check_class
from internlm.initialize.load_checkpoint import check_checkpoint, check_foreign_weights, is_left_open
from internlm.initialize.multiple_choice import build_multiple_choice
from internlm.initialize.sample_texts import build_sample_texts
from internlm.initialize.stages import build_meta_model, check_parameter_groups, parameter_groups
from internlm.initialize.tokenizers import compare_with_checkpoint, data_tokenizer
from internlm.initialize.train_sources import train_sources
from internlm.initialize.user_hooks import build_user_hooks, check_user_hooks
from internlm.initialize.valid_sets import find_sets, trained_on, valid_places
from internlm.initialize.vision_costs import describe_vision
from internlm.model.llava.model import Llava
from internlm.model.ops.implementations import OpSettings, describe
from internlm.solver.optimizer.parameter_groups import is_frozen
from internlm.utils.errors import CheckpointError, ConfigError, UserError
from internlm.utils.optional_packages import why_unusable
from internlm.utils.place_names import with_place_names
from internlm.utils.storage import StoragePath, storage_path

Check = Callable[[Config, ParallelContext], list[str]]
"""Returns notices for the user; raises the UserError that the run would fail with."""


def check_surroundings(config: Config, context: ParallelContext) -> list[str]:
    """Run every check of `CHECKS`.

    Returns:
        Notices, one line each, about problems that do not stop the run.

    Raises:
        UserError: the run would fail; lists the errors of all checks.
    """
    return _run_all(CHECKS, config, context)


def rehearse_start(config: Config, context: ParallelContext) -> list[str]:
    """Rehearse the start of a run.

    Checks loaders, tokenizers, the checkpoint to start from, the save folder, hooks and parameter groups. Checksums and
    tensors are not read, and everything built is discarded.

    Returns:
        Notices, one line each, about problems that do not stop the run.

    Raises:
        UserError: data is missing or malformed, a checkpoint is incompatible, or saving would overwrite foreign files.
    """
    checks = (
        _train_loader,
        _valid_loaders,
        _data_tokenizer,
        _checkpoint,
        _save_folder,
        _built_hooks,
        _parameter_groups,
        _pictures,
    )
    return _run_all(checks, config, context)


def _run_all(checks: tuple[Check, ...], config: Config, context: ParallelContext) -> list[str]:
    notices: list[str] = []
    errors: list[UserError] = []
    for check in checks:
        try:
            notices += map(with_place_names, check(config, context))
        except UserError as error:
            errors.append(error)
    if len(errors) > 1:
        texts = (error.mistakes if isinstance(error, ConfigError) else [str(error)] for error in errors)
        # One cause may fail several checks.
        raise ConfigError(dict.fromkeys(text for found in texts for text in found))
    if errors:
        raise errors[0]
    return notices


def _train_folder(config: Config, context: ParallelContext) -> list[str]:
    for source in train_sources(config):
        folder = train_folder(source.config)
        if folder is None:
            return ["data.train_folder is None: the run trains on random tokens, which only serves to measure speed"]
        data = source.config.data
        if data.type == "streaming":
            find_row_files(locate_dataset(folder), data.subset_name)
        elif data.type == "mocked":
            build_replay_stream(source.config, context)
        else:
            find_train_files(folder, file_format(source.config))
    return []


def _valid_folder(config: Config, context: ParallelContext) -> list[str]:
    if config.data.valid_every > 0:
        for place in valid_places(config):
            if place.type == "streaming":
                locate_dataset(place.folder)
        find_sets(config, with_rows=False)
    return trained_on(config)


def _train_loader(config: Config, context: ParallelContext) -> list[str]:
    build_loader(config, context)
    return []


def _valid_loaders(config: Config, context: ParallelContext) -> list[str]:
    build_valid_sets(config, context)
    return []


def _tokenizer(config: Config, context: ParallelContext) -> list[str]:
    """Check that the tokenizer exists. Training on token ids does not need it, so only generation fails without it."""
    path = config.data.tokenizer_path
    if path is not None and any(source.config.data.type == "streaming" for source in train_sources(config)):
        load_tokenizer(path)
    if path is None or Path(path).exists():
        return []
    return [f"data.tokenizer_path = {path!r}: no such tokenizer; training does not need it, `internlm generate` does"]


def _data_tokenizer(config: Config, context: ParallelContext) -> list[str]:
    known = data_tokenizer(config)
    start = _find_start(config)
    if start is not None:
        compare_with_checkpoint(config, start[0], known)
    return []


def _checkpoint(config: Config, context: ParallelContext) -> list[str]:
    """Check that the checkpoint to start from is compatible with the config."""
    start, info = _find_start(config), config.ckpt.load_ckpt_info
    if start is None:
        return []
    path, manifest, contents = start
    if manifest is not None:
        check_contents(path, manifest, contents)
        check_checkpoint(config, path, manifest, contents)
        return [f"the run would resume from '{path}'" if _resumes(config) else f"the run would start from '{path}'"]
    assert info is not None
    check_foreign_weights(config, info, path)
    return [f"the run would start with the weights of '{path}'"]


def _save_folder(config: Config, context: ParallelContext) -> list[str]:
    """Check that the save folder contains no foreign files where the run will save."""
    ckpt = config.ckpt
    if not (ckpt.enable_save_ckpt and ckpt.save_ckpt_folder):
        return []
    start = _find_start(config)
    # The run continues at the checkpoint's step only if it loads the counters.
    manifest = start[1] if start is not None and "scheduler" in start[2] else None
    manager = CheckpointManager(
        ckpt.save_ckpt_folder,
        snapshot_folder=ckpt.snapshot_ckpt_folder or None,
        after_save=(lambda _: None) if ckpt.enable_internevo2hf_ckpt else None,
    )
    first, last = (manifest.step if manifest is not None else 0) + 1, config.data.total_steps
    manager.check_room(context, first, last, snapshots=ckpt.oss_snapshot_freq is not None)
    return []


def _find_start(config: Config) -> tuple[StoragePath, Manifest | None, tuple[str, ...]] | None:
    """The checkpoint or weights that the run starts from, the manifest of a native one, and the contents to load.

    Raises:
        CheckpointError: the configured checkpoint is missing, or no checkpoint to resume from can be read.
    """
    refused: list[str] = []
    found = _to_resume(config)
    for checkpoint in reversed(found):
        try:
            manifest = read_manifest(checkpoint.path)
        except CheckpointError as error:
            refused.append(str(error))
            continue
        if manifest is not None:
            return checkpoint.path, manifest, manifest.contents
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
    """Check that the weights in `ckpt.load_ckpt_info` exist, unless the run resumes from its own checkpoint."""
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
    """Check that the folders of checkpoints, routing and the stop file can be used, leaving nothing in them."""
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
    replay = config.moe.replay
    if replay.write is not None:
        reason = why_not_writable(storage_path(replay.write).local)
        if reason is not None:
            raise ConfigError(f"moe.replay.write = {replay.write!r} cannot be written: {reason}")
    if replay.read is not None and not storage_path(replay.read).local.is_dir():
        raise ConfigError(
            f"moe.replay.read = {replay.read!r} is not a folder; give one that moe.replay.write wrote, which has a "
            "folder step-N for each step"
        )
    return []


def why_not_writable(folder: Path) -> str | None:
    """Why no file can be created in a local folder, which need not exist yet; None if one can."""
    folder = folder.absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists() or path.is_symlink())
    if not existing.is_dir():
        return f"'{existing}' is a file where a folder should be"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"no permission to write to '{existing}'"
    try:
        # The superuser may write everywhere but in folders such as /proc, which have no files of users.
        with tempfile.TemporaryFile(dir=existing):
            return None
    except OSError as error:
        return f"no file can be created in '{existing}' ({error.strerror})"


def _questions_and_prompts(config: Config, context: ParallelContext) -> list[str]:
    """Check that questions and prompts can be read, and fit into the sequences of the run."""
    build_multiple_choice(config)
    if config.data.generate_every > 0:
        build_sample_texts(config)
    return []


def _packages(config: Config, context: ParallelContext) -> list[str]:
    describe(context.device, OpSettings.of(config.model, use_float8=config.float8.enable_float8_linear))
    reason = why_unusable("torch.utils.tensorboard", "SummaryWriter") if config.enable_tb else None
    return [f"TensorBoard is off: {reason} (pip install tensorboard, or set enable_tb = False)"] if reason else []


def _hooks(config: Config, context: ParallelContext) -> list[str]:
    check_user_hooks(config.hooks)
    return []


def _built_hooks(config: Config, context: ParallelContext) -> list[str]:
    build_user_hooks(config.hooks)
    return []


def _parameter_groups(config: Config, context: ParallelContext) -> list[str]:
    """Check that every group of `optimizer.groups` applies to a parameter, and report what is frozen."""
    groups = parameter_groups(config)
    if not groups:
        return []
    parameters = dict(build_meta_model(config).named_parameters())
    check_parameter_groups(config, parameters)
    frozen = [parameter.numel() for name, parameter in parameters.items() if is_frozen(name, groups)]
    what = "optimizer.groups freezes" if config.optimizer.groups else f"model_type = '{config.model_type}' freezes"
    return [f"{what} {sum(frozen):,} parameters, in {len(frozen)} tensors"] if frozen else []


def _pictures(config: Config, context: ParallelContext) -> list[str]:
    if config.model_type != "LLAVA":
        return []
    model = build_meta_model(config)
    assert isinstance(model, Llava)
    return [describe_vision(model, parameter_groups(config), config.data.seq_len)]


CHECKS: tuple[Check, ...] = (
    _train_folder,
    _valid_folder,
    _questions_and_prompts,
    _tokenizer,
    _weights,
    _folders,
    _packages,
    _hooks,
    check_class,
)
