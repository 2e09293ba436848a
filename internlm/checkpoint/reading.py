"""What is in the folder of a checkpoint: tensors, counters, config, and whether all is as it was written."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed.checkpoint as dcp

from internlm.checkpoint import folder as folders
from internlm.checkpoint.boxed_tensor import BoxedTensor, BoxLoadPlanner
from internlm.checkpoint.dcp_storage import METADATA_FILE, StorageReader
from internlm.checkpoint.folder import Manifest
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
    except Exception as error:  # unpickling bytes that are no pickle raises nearly anything
        raise CheckpointError(
            f"the checkpoint '{path}' cannot be read: its {METADATA_FILE} is damaged ({describe_error(error)})"
        ) from error


def saved_shapes(path: StoragePath) -> dict[str, tuple[int, ...] | None]:
    """Key -> shape of every tensor in a checkpoint; None for what is no tensor.

    Raises:
        CheckpointError: the list of tensors is missing or damaged.
    """
    saved = read_metadata(path).state_dict_metadata
    return {key: tuple(value.size) if hasattr(value, "size") else None for key, value in saved.items()}


def load_tensors(path: StoragePath, tensors: dict[str, Any], *, no_dist: bool) -> None:
    """Fill `tensors` from the checkpoint at `path`; each rank reads only what its boxes need.

    Raises:
        CheckpointError: a tensor is missing or has another shape, or the files are damaged.
    """
    saved = saved_shapes(path)
    mistakes = []
    for key, value in tensors.items():
        if key not in saved:
            mistakes.append(f"'{key}' is missing")
        elif isinstance(value, BoxedTensor) and saved[key] != tuple(value.size()):
            mistakes.append(f"'{key}' has shape {list(saved[key] or [])}, the model wants {list(value.size())}")
    if mistakes:
        raise CheckpointError(f"the checkpoint '{path}' does not fit this model:{listed(mistakes)}")
    try:
        with without_single_process_warning():
            dcp.load(tensors, storage_reader=StorageReader(path), planner=BoxLoadPlanner(), no_dist=no_dist)
    except dcp.api.CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        raise CheckpointError(
            f"the checkpoint '{path}' cannot be read: rank {rank}: {type(cause).__name__}: {cause}"
        ) from error


def read_context(path: StoragePath) -> dict[str, Any]:
    """The counters that a checkpoint carries.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        return json_object((path / CONTEXT_FILE).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{path / CONTEXT_FILE}' cannot be read: {error}") from error


def read_config(path: StoragePath) -> Config:
    """The config that a checkpoint was written with.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        return Config.model_validate(json_object((path / CONFIG_FILE).read_text()))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{path / CONFIG_FILE}' cannot be read: {error}") from error


def check_files(path: StoragePath, context: ParallelContext) -> Manifest:
    """Compare a checkpoint with the checksums of its mark, each rank a share of the files; collective.

    Raises:
        CheckpointError: it has no mark, or a file is not what was written.
    """

    def read() -> Manifest | str:
        try:
            mark = folders.read_mark(path)
        except (CheckpointError, OSError) as error:
            return str(error)
        return (
            mark or f"'{path}' is no complete checkpoint: it has no mark (a file named by its step, such as 100.step)"
        )

    mark = from_main_rank(context, read)
    if isinstance(mark, str):
        raise CheckpointError(mark)
    own = folders.find_damage(path, mark, context.rank, context.world_size)
    lines = [line for damage in of_all_ranks(context, own) for line in damage]
    if lines:
        raise CheckpointError(f"the checkpoint '{path}' is damaged:{listed(lines)}")
    return mark


def listed(lines: list[str], most: int = 20) -> str:
    """Lines below each other, for a message."""
    more = f"\n  and {len(lines) - most} more" if len(lines) > most else ""
    return "".join(f"\n  {line}" for line in lines[:most]) + more


@contextmanager
def without_single_process_warning() -> Iterator[None]:
    """A context without torch's warning about a run of one process."""
    with warnings.catch_warnings():
        # One process without a process group is a normal way to run, and asked for with no_dist.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield
