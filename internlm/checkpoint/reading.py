"""Reads a checkpoint: tensors, counters, config; and verifies its files."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed.checkpoint as dcp

from internlm.checkpoint.boxed_tensor import BoxedTensor, BoxLoadPlanner
from internlm.checkpoint.dcp_storage import METADATA_FILE, StorageReader
from internlm.checkpoint.manifest import Manifest, find_damage, read_manifest
from internlm.config.legacy import translate_legacy
from internlm.config.schema import Config
from internlm.core.communication.objects import from_main_rank, of_all_ranks
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.failure import describe_error
from internlm.utils.errors import CheckpointError
from internlm.utils.json_text import json_object
from internlm.utils.storage import StoragePath

CONTEXT_FILE = "context.json"
CONFIG_FILE = "config.json"


def read_metadata(path: StoragePath) -> Any:
    """The metadata of a checkpoint (torch.distributed.checkpoint).

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return StorageReader(path).read_metadata()
    except OSError as error:
        raise CheckpointError(f"the checkpoint '{path}' cannot be read: {error}") from error
    except Exception as error:  # unpickling damaged bytes may raise nearly anything
        raise CheckpointError(
            f"the checkpoint '{path}' cannot be read: its {METADATA_FILE} is damaged ({describe_error(error)})"
        ) from error


def saved_shapes(path: StoragePath) -> dict[str, tuple[int, ...] | None]:
    """Key -> shape of every tensor in a checkpoint; None for other values.

    Raises:
        CheckpointError: the list of tensors is missing or damaged.
    """
    saved = read_metadata(path).state_dict_metadata
    return {key: tuple(value.size) if hasattr(value, "size") else None for key, value in saved.items()}


def load_tensors(path: StoragePath, tensors: dict[str, Any], *, no_dist: bool) -> None:
    """Fill `tensors` from the checkpoint at `path`; each rank reads only its own boxes.

    Raises:
        CheckpointError: a tensor is missing or has another shape, or the files are damaged.
    """
    saved = saved_shapes(path)
    misfits = []
    for key, value in tensors.items():
        if key not in saved:
            misfits.append(f"'{key}' is missing")
        elif isinstance(value, BoxedTensor) and saved[key] != tuple(value.size()):
            misfits.append(f"'{key}' has shape {list(saved[key] or [])}, the model expects {list(value.size())}")
    if misfits:
        raise CheckpointError(f"the checkpoint '{path}' does not fit this model:{listed(misfits)}")
    try:
        with without_single_process_warning():
            dcp.load(tensors, storage_reader=StorageReader(path), planner=BoxLoadPlanner(), no_dist=no_dist)
    except dcp.api.CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        raise CheckpointError(
            f"the checkpoint '{path}' cannot be read: rank {rank}: {type(cause).__name__}: {cause}"
        ) from error


def read_context(path: StoragePath) -> dict[str, Any]:
    """The content of `context.json`.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        return json_object((path / CONTEXT_FILE).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{path / CONTEXT_FILE}' cannot be read: {error}") from error


def read_config_keys(path: StoragePath) -> dict[str, Any]:
    """The keys of the config that a checkpoint was written with, under their current names; values unchecked.

    Raises:
        OSError, ValueError: the file is missing or damaged.
    """
    keys = json_object((path / CONFIG_FILE).read_text())
    translate_legacy(keys, {})
    return keys


def read_config(path: StoragePath) -> Config:
    """The config that a checkpoint was written with.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        return Config.model_validate(read_config_keys(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{path / CONFIG_FILE}' cannot be read: {error}") from error


def check_files(path: StoragePath, context: ParallelContext) -> Manifest:
    """Verify the files of a checkpoint against its manifest, each rank a share of them; collective.

    Raises:
        CheckpointError: it has no manifest, or a file differs from what was written.
    """

    def read() -> Manifest | str:
        try:
            manifest = read_manifest(path)
        except (CheckpointError, OSError) as error:
            return str(error)
        return (
            manifest
            or f"'{path}' is not a complete checkpoint: it has no manifest (a file named by its step, such as 100.step)"
        )

    manifest = from_main_rank(context, read)
    if isinstance(manifest, str):
        raise CheckpointError(manifest)
    own = find_damage(path, manifest, context.rank, context.world_size)
    lines = [line for damage in of_all_ranks(context, own) for line in damage]
    if lines:
        raise CheckpointError(f"the checkpoint '{path}' is damaged:{listed(lines)}")
    return manifest


def listed(lines: list[str], limit: int = 20) -> str:
    """Format lines as an indented list, at most `limit` of them, for a message."""
    more = f"\n  and {len(lines) - limit} more" if len(lines) > limit else ""
    return "".join(f"\n  {line}" for line in lines[:limit]) + more


@contextmanager
def without_single_process_warning() -> Iterator[None]:
    """A context without torch's warning about a run of one process."""
    with warnings.catch_warnings():
        # With no_dist, a single process without a process group is intended.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield
