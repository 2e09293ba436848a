"""Saving and resuming a run.

A checkpoint holds global tensors: weights under `model/<name>`, optimizer state under `optimizer/<kind>/<name>`, the
random state of each rank under `rng/<rank>`, and in `context.json` the counters, the data cursor, the scaler and the
hooks. Nothing in it depends on the layout that wrote it.
"""

from __future__ import annotations

import json
import pickle
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from internlm.checkpoint import folder as folders
from internlm.checkpoint.boxed_tensor import BoxedTensor, BoxLoadPlanner, BoxSavePlanner, merge_by_key
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.context.random import random_state, set_random_state
from internlm.core.hooks import SaveResult, TrainState
from internlm.core.parallel.fsdp import local_tensor, reshard
from internlm.core.parallel.shard_spec import shard_spec_of
from internlm.core.trainer import Trainer
from internlm.solver.optimizer.hybrid_zero import HybridZeroOptimizer
from internlm.utils.errors import CheckpointError
from internlm.utils.logging import get_logger

logger = get_logger(__name__)

CONTEXT_FILE = "context.json"
CONFIG_FILE = "config.json"
MASTER_PREFIX = "optimizer/master/"
CONTENTS = ("model", "optimizer", "scheduler", "sampler")


def model_tensors(*chunks: nn.Module) -> dict[str, Any]:
    """`model/<name>` -> this rank's boxes of every parameter of these modules, under its global name."""
    for chunk in chunks:
        reshard(chunk)
    parameters = dict.fromkeys(parameter for chunk in chunks for parameter in chunk.parameters())
    specs = {parameter: shard_spec_of(parameter) for parameter in parameters}
    return dict(
        merge_by_key(
            (f"model/{spec.name}", BoxedTensor.of_parameter(local_tensor(parameter), spec))
            for parameter, spec in specs.items()
        )
    )


def optimizer_tensors(optimizer: HybridZeroOptimizer) -> dict[str, Any]:
    """`optimizer/<kind>/<name>` -> this rank's boxes of masters and moments, under the parameter's global name."""
    return dict(
        merge_by_key(
            (f"optimizer/{key}", BoxedTensor(shard_spec_of(parameter).global_shape, torch.float32, pieces))
            for key, parameter, pieces in optimizer.sharded_state()
        )
    )


def load_tensors(path: Path, tensors: dict[str, Any], *, no_dist: bool) -> None:
    """Fill `tensors` from the checkpoint at `path`; each rank reads only what its boxes need.

    Raises:
        CheckpointError: a tensor is missing or has another shape, or the files are damaged.
    """
    try:
        saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"the checkpoint '{path}' cannot be read: {error}") from error
    mistakes = []
    for key, value in tensors.items():
        if key not in saved:
            mistakes.append(f"'{key}' is missing")
        elif isinstance(value, BoxedTensor):
            found = getattr(saved[key], "size", None)
            if found != value.size():
                mistakes.append(f"'{key}' has shape {list(found or [])}, the model wants {list(value.size())}")
    if mistakes:
        shown = "\n  ".join(mistakes[:20])
        more = f"\n  and {len(mistakes) - 20} more" if len(mistakes) > 20 else ""
        raise CheckpointError(f"the checkpoint '{path}' does not fit this model:\n  {shown}{more}")
    try:
        with _without_single_process_warning():
            dcp.load(tensors, storage_reader=dcp.FileSystemReader(path), planner=BoxLoadPlanner(), no_dist=no_dist)
    except dcp.api.CheckpointException as error:
        raise CheckpointError(f"the checkpoint '{path}' cannot be read: {_first_failure(error)}") from error


def read_context(path: Path) -> dict[str, Any]:
    """The counters that a checkpoint carries.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        return json.loads((path / CONTEXT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{path / CONTEXT_FILE}' cannot be read: {error}") from error


class CheckpointManager:
    """Saves a trainer's whole state and puts it back.

    Args:
        save_folder: one folder a step is made in it; None saves nothing.
        files: name -> text, copied into every checkpoint (the config, for tools that come later).
    """

    def __init__(self, save_folder: Path | str | None, files: dict[str, str] | None = None) -> None:
        self.save_folder = None if save_folder is None else Path(save_folder)
        self.files = dict(files or {})
        self._ended: list[SaveResult] = []
        self._failed: str | None = None

    # -- saving ---------------------------------------------------------------------------------------------------

    def save(self, trainer: Trainer, *, snapshot: bool = False) -> None:
        started = time.perf_counter()
        error = None
        try:
            path = self._write(trainer)
        except CheckpointError as failure:
            error, path = str(failure), Path(str(self.save_folder))
        self._failed = error
        seconds = time.perf_counter() - started
        if trainer.is_main_rank:
            self._ended.append(SaveResult(trainer.state.step, path, snapshot, seconds, seconds, error))

    def poll(self) -> list[SaveResult]:
        ended, self._ended = self._ended, []
        return ended

    def finish(self) -> None:
        if self._failed is not None:
            raise CheckpointError(self._failed)

    def drain(self, seconds: float) -> None:
        pass

    def _write(self, trainer: Trainer) -> Path:
        """Write `<save_folder>/<step>/`; collective. Returns it once it is complete.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        save_folder = self.save_folder
        if save_folder is None:
            raise CheckpointError("this run has no folder to save to: set ckpt.save_ckpt_folder")
        step = trainer.state.step
        context = trainer.context
        writing = save_folder / f".writing-{step}"
        _on_main_rank(context, lambda: folders.begin_writing(save_folder, step), f"prepare '{writing}'")
        optimizer = trainer.engine.optimizer
        assert isinstance(optimizer, HybridZeroOptimizer)
        optimizer.finish_gathering()
        tensors = {
            **model_tensors(*optimizer.chunks),
            **optimizer_tensors(optimizer),
            f"rng/{context.rank}": random_state(),
        }
        try:
            with _without_single_process_warning():
                dcp.save(
                    tensors,
                    storage_writer=dcp.FileSystemWriter(writing, sync_files=False),
                    planner=BoxSavePlanner(),
                    no_dist=context.world_group is None,
                )
        except dcp.api.CheckpointException as error:
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to '{writing}': {_first_failure(error)}"
            ) from error
        state = {
            "state": asdict(trainer.state),
            "inf_nan_skip_batches": float(trainer.num_skipped_updates),
            "num_updates": optimizer.num_updates,
            "scaler": optimizer.scaler.state_dict(),
            "data": _state_of(trainer.train_loader),
            "hooks": {hook.name: hook.state_dict() for hook in trainer.hooks},
            "world_size": context.world_size,
            "layout": context.layout.describe(),
        }

        def finish() -> None:
            (writing / CONTEXT_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")
            for name, text in self.files.items():
                (writing / name).write_text(text, encoding="utf-8")
            folders.finish_writing(writing, step)

        _on_main_rank(context, finish, f"complete the checkpoint of step {step} in '{self.save_folder}'")
        return save_folder / str(step)

    # -- loading --------------------------------------------------------------------------------------------------

    def latest(self, context: ParallelContext) -> Path | None:
        """The newest complete checkpoint of the save folder; collective.

        The main rank looks for all: another machine may see a shared folder as it was a moment ago.
        """
        save_folder = self.save_folder
        if save_folder is None:
            return None
        found: list[int] = []

        def look() -> None:
            folders.finish_replacing(save_folder)
            found.extend(folders.complete_steps(save_folder)[-1:])

        _on_main_rank(context, look, f"look for checkpoints in '{save_folder}'")
        if context.world_group is not None:
            message = [found]
            dist.broadcast_object_list(message, src=0)
            found = message[0]
        return save_folder / str(found[0]) if found else None

    def load(self, trainer: Trainer, path: Path, content: Iterable[str] = CONTENTS) -> None:
        """Put a checkpoint into a trainer; collective.

        Args:
            trainer: freshly built, before its first step.
            path: a checkpoint folder.
            content: any of "model", "optimizer" (moments, scaler, and together with "model" the fp32 masters),
                "scheduler" (the step, from which learning rate and beta2 follow) and "sampler" (the data cursor and
                token counter), or "all".

        Raises:
            CheckpointError: the checkpoint does not fit, is damaged, or `content` is unknown.
        """
        wanted = set(CONTENTS if "all" in content else content)
        unknown = wanted - set(CONTENTS)
        if unknown:
            raise CheckpointError(f"unknown checkpoint content {sorted(unknown)}; allowed: {list(CONTENTS)} or 'all'")
        optimizer = trainer.engine.optimizer
        assert isinstance(optimizer, HybridZeroOptimizer)
        alone = trainer.context.world_group is None
        context = read_context(path)
        tensors: dict[str, Any] = {}
        if "model" in wanted:
            tensors.update(model_tensors(*optimizer.chunks))
        if "optimizer" in wanted:
            tensors.update(optimizer_tensors(optimizer))
            if "model" not in wanted:
                # Masters are weights: the next update would put them in the place of those that the user wants.
                tensors = {key: value for key, value in tensors.items() if not key.startswith(MASTER_PREFIX)}
        rng_key = f"rng/{trainer.context.rank}"
        whole_run = wanted == set(CONTENTS)
        if whole_run and context["world_size"] == trainer.context.world_size:
            tensors[rng_key] = None
        load_tensors(path, tensors, no_dist=alone)
        if "model" in wanted:
            optimizer.reset_masters(keep_loaded="optimizer" in wanted)
        if "optimizer" in wanted:
            optimizer.num_updates = context["num_updates"]
            optimizer.scaler.load_state_dict(context["scaler"])
            trainer.num_skipped_updates.fill_(context["inf_nan_skip_batches"])
        saved = TrainState(**context["state"])
        if "scheduler" in wanted:
            trainer.state.step = saved.step
        if "sampler" in wanted:
            trainer.state.num_consumed_samples = saved.num_consumed_samples
            trainer.state.num_consumed_tokens = saved.num_consumed_tokens
            take_back = getattr(trainer.train_loader, "load_state_dict", None)
            if take_back is not None and context.get("data"):
                take_back(context["data"])
        if whole_run:
            for hook in trainer.hooks:
                if hook.name in context["hooks"]:
                    hook.load_state_dict(context["hooks"][hook.name])
            if tensors.get(rng_key) is not None:
                set_random_state(tensors[rng_key])


def _state_of(loader: object) -> dict[str, Any]:
    """What a loader wants to know when the run is resumed; its cursor is the trainer's."""
    state_dict = getattr(loader, "state_dict", None)
    return {} if state_dict is None else state_dict()


def _on_main_rank(context: ParallelContext, action: Callable[[], object], what: str) -> None:
    """Do something with files on the main rank while the others wait; all ranks fail when it fails."""
    failure: list[str | None] = [None]
    if context.is_main_rank:
        try:
            action()
        except OSError as error:
            failure[0] = f"cannot {what}: {error}"
    if context.world_group is not None:
        dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise CheckpointError(failure[0])


@contextmanager
def _without_single_process_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        # One process without a process group is a normal way to run, and asked for with no_dist.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _first_failure(error: dcp.api.CheckpointException) -> str:
    rank, (cause, _) = min(error.failures.items())
    return f"rank {rank}: {type(cause).__name__}: {cause}"
