"""Tensors of a checkpoint, read and written one at a time without a trainer; for inspection and conversion."""

from __future__ import annotations

import io
import json
import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata

from internlm.checkpoint.boxed_tensor import BoxedTensor, BoxLoadPlanner, BoxSavePlanner
from internlm.checkpoint.dcp_storage import StorageReader
from internlm.checkpoint.reading import CONFIG_FILE, CONTEXT_FILE, read_metadata, without_single_process_warning
from internlm.checkpoint.run_state import MODEL_PREFIX, OPTIMIZER_PREFIX
from internlm.checkpoint.save_folder import begin_writing
from internlm.checkpoint.saving import SaveTask, complete, make_plan, write_part
from internlm.checkpoint.weight_source import LazyTensor
from internlm.config.schema import Config
from internlm.core.parallel.shard_spec import Box
from internlm.utils.errors import CheckpointError
from internlm.utils.storage import StoragePath


@dataclass(frozen=True)
class Entry:
    """A tensor of a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of the elements in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorReader:
    """Reads full tensors of a checkpoint, on the CPU; also a `WeightSource` of its weights.

    Attributes:
        path: the checkpoint.
        entries: key (`model/<name>`, `optimizer/<kind>/<name>`) -> shape and dtype.

    Raises:
        CheckpointError: the list of tensors is missing or damaged.
    """

    def __init__(self, path: StoragePath) -> None:
        self.path = path
        self._storage = _ReaderWithMetadata(path)
        saved = self._storage.metadata.state_dict_metadata
        self.entries = {
            key: Entry(tuple(value.size), value.properties.dtype)
            for key, value in sorted(saved.items())
            if isinstance(value, TensorStorageMetadata)
        }
        self._values = {key for key, value in saved.items() if isinstance(value, BytesStorageMetadata)}

    def read_key(self, key: str) -> Tensor:
        """A tensor by its key.

        Raises:
            CheckpointError: there is no such tensor, or the file is damaged.
        """
        if key not in self.entries:
            raise CheckpointError(f"the checkpoint '{self.path}' has no tensor '{key}'")
        entry = self.entries[key]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        self._load({key: tensor})
        return tensor

    def _load(self, tensors: dict[str, Any]) -> None:
        try:
            with without_single_process_warning():
                dcp.load(tensors, storage_reader=self._storage, planner=BoxLoadPlanner(), no_dist=True)
        except dcp.api.CheckpointException as error:
            cause, _ = error.failures[min(error.failures)]
            raise CheckpointError(f"the checkpoint '{self.path}' cannot be read: {cause}") from error

    # -- as a source of weights -----------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Global names of the weights."""
        return [key.removeprefix(MODEL_PREFIX) for key in self.entries if key.startswith(MODEL_PREFIX)]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a weight."""
        return self.entries[f"{MODEL_PREFIX}{name}"].shape

    def read(self, name: str) -> Tensor:
        """A weight by its global name; raises as `read_key`."""
        return self.read_key(f"{MODEL_PREFIX}{name}")


class _ReaderWithMetadata(StorageReader):
    """Reads the list of tensors only once."""

    def __init__(self, path: StoragePath) -> None:
        super().__init__(path)
        self.metadata = read_metadata(path)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        return self.metadata


class _LazyPlanner(BoxSavePlanner):
    """Computes each tensor when it is written."""

    def __init__(self, tensors: Mapping[str, LazyTensor]) -> None:
        super().__init__()
        self._tensors = tensors

    def resolve_data(self, write_item: Any) -> Tensor | io.BytesIO:
        key = write_item.index.fqn
        lazy = self._tensors[key]
        if lazy.read_slice is None:
            tensor, shape = lazy.read(), lazy.shape
        else:
            tensor, shape = lazy.read_slice(write_item.index.offset[0])[None], (1, *lazy.shape[1:])
        assert (tuple(tensor.shape), tensor.dtype) == (shape, lazy.dtype), key
        return tensor.contiguous()


@dataclass(frozen=True)
class OptimizerState:
    """The state from which a run continues, besides its weights.

    Attributes:
        tensors: `<kind>/<global name>` -> masters (of weights that are not fp32 themselves) and moments, in fp32.
        context: content of `context.json`: state, inf_nan_skip_batches, num_updates, scaler.
    """

    tensors: Mapping[str, LazyTensor]
    context: Mapping[str, Any]


def write_weights(
    save_folder: StoragePath,
    tensors: Mapping[str, LazyTensor],
    *,
    config: Config,
    step: int = 0,
    files: Mapping[str, bytes] | None = None,
    optimizer: OptimizerState | None = None,
) -> StoragePath:
    """Write a checkpoint without a trainer; returns `<save_folder>/<step>`.

    One tensor is in memory at a time, or one slice if it can be computed by slices.

    Args:
        save_folder: folder of checkpoints.
        tensors: by global name, in the order in which they are computed.
        config: config of the model.
        step: step of the checkpoint.
        files: name (with folders) -> content of further files.
        optimizer: None for a checkpoint of weights only.

    Raises:
        StorageError: the checkpoint cannot be written.
        CheckpointError: a tensor could not be computed or written.
    """
    final = save_folder / str(step)
    writing = begin_writing(final, uuid.uuid4().hex[:8], step)
    small = {CONFIG_FILE: json.dumps(config.model_dump(mode="json"), indent=1).encode(), **(files or {})}
    contents: tuple[str, ...] = ("model",)
    by_key = {f"{MODEL_PREFIX}{name}": lazy for name, lazy in tensors.items()}
    if optimizer is not None:
        contents = ("model", "optimizer", "scheduler")
        by_key |= {f"{OPTIMIZER_PREFIX}{name}": lazy for name, lazy in optimizer.tensors.items()}
        small[CONTEXT_FILE] = json.dumps(optimizer.context, indent=1).encode()
    task = SaveTask(step, final, writing, contents=contents, files=small)
    # The plan needs shapes only: meta tensors take no memory.
    boxed = {
        key: BoxedTensor(
            lazy.shape,
            lazy.dtype,
            [(box, torch.empty(box.size, dtype=lazy.dtype, device="meta")) for box in _boxes(lazy)],
        )
        for key, lazy in by_key.items()
    }
    plan = make_plan(boxed)
    assert plan.metadata is not None
    complete(task, plan.metadata, [write_part(task, plan, _LazyPlanner(by_key))])
    return final


def _boxes(lazy: LazyTensor) -> list[Box]:
    """The boxes that are computed at once."""
    if lazy.read_slice is None:
        origin = (0,) * len(lazy.shape)
        return [Box(origin, origin, lazy.shape)]
    rest = (0,) * (len(lazy.shape) - 1)
    return [Box((index, *rest), (index, *rest), (1, *lazy.shape[1:])) for index in range(lazy.shape[0])]
