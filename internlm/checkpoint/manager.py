"""Saving and resuming a run.

A checkpoint holds global tensors: weights under `model/<name>`, optimizer state under `optimizer/<kind>/<name>`, the
random state of each rank under `rng/<rank>`, and in `context.json` the counters, the data cursor, the scaler and the
hooks. Nothing in it depends on the layout that wrote it.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from internlm.checkpoint import folder as folders
from internlm.checkpoint.background import BackgroundWriter, SaveOutcome
from internlm.checkpoint.boxed_tensor import BoxSavePlanner
from internlm.checkpoint.folder import WHOLE_RUN, FoundCheckpoint, Manifest
from internlm.checkpoint.foreign_folders import in_the_way
from internlm.checkpoint.reading import CONTEXT_FILE, check_files, listed
from internlm.checkpoint.run_state import load_run, model_tensors, optimizer_tensors
from internlm.checkpoint.saving import (
    RankPlan,
    SaveTask,
    WrittenPart,
    announce_part,
    complete,
    discard,
    follow_up,
    make_plan,
    write_part,
)
from internlm.core.batch_source import StatefulSource
from internlm.core.communication.objects import from_main_rank, of_all_ranks
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.context.random import random_state
from internlm.core.hooks import SaveResult
from internlm.core.optimizer_protocol import Optimizer
from internlm.core.trainer import Trainer
from internlm.utils.errors import CheckpointError
from internlm.utils.logging import get_logger
from internlm.utils.storage import StoragePath, storage_path

logger = get_logger(__name__)

CheckBeforeLoading = Callable[[StoragePath, Manifest, Collection[str]], None]
"""(checkpoint, its manifest, what of it is to be loaded)"""


class CheckpointManager:
    """Saves a trainer's whole state and puts it back.

    Args:
        save_folder: one folder a step is made in it, local or in an object store; None saves nothing.
        files: name -> text, copied into every checkpoint (the config, for tools that come later).
        snapshot_folder: of snapshots, of which the newest two are kept; None: `<save_folder>/snapshot`.
        keep_latest: complete checkpoints to keep; None keeps all.
        async_save: write in a process beside this one, while training goes on.
        after_save: a function of a module, called with each complete checkpoint (no snapshot), on the main rank or in
            the process beside it.
    """

    def __init__(
        self,
        save_folder: StoragePath | Path | str | None,
        files: dict[str, str] | None = None,
        *,
        snapshot_folder: StoragePath | Path | str | None = None,
        keep_latest: int | None = None,
        async_save: bool = False,
        after_save: Callable[[StoragePath], None] | None = None,
    ) -> None:
        self.save_folder = _as_storage_path(save_folder)
        self.snapshot_folder = _as_storage_path(snapshot_folder)
        self._roots = [folder for folder in (self.save_folder, self.snapshot_folder) if folder is not None]
        if self.snapshot_folder is None and self.save_folder is not None:
            self.snapshot_folder = self.save_folder / "snapshot"
        self.files = dict(files or {})
        self.keep_latest = keep_latest
        self.async_save = async_save
        self.after_save = after_save
        self._plan: tuple[Optimizer, RankPlan] | None = None
        # Started now: it is ready when the first save comes.
        self._background = BackgroundWriter() if async_save else None
        self._under_way: tuple[SaveTask, bool, float, float] | None = None
        self._results: list[SaveResult] = []
        self._newest: SaveResult | None = None
        self._context: ParallelContext | None = None

    # -- saving ---------------------------------------------------------------------------------------------------

    def check_writable(self, context: ParallelContext) -> None:
        """Write a file into the folder of checkpoints, and into one of snapshots that lies elsewhere, and remove it;
        collective.

        Raises:
            CheckpointError: some machine of the job cannot.
        """
        failure = None
        local_rank = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or context.rank
        if int(local_rank) == 0:
            for folder in self._roots:
                try:
                    folder.make_folder()
                    # Were this killed here, the next save would remove it, as it does with its own leftovers.
                    ping = folder / f"{folders.WRITING_PREFIX}ping-{socket.gethostname()}"
                    ping.write_text("ping")
                    ping.remove()
                except OSError as error:
                    failure = f"checkpoints cannot be saved to '{folder}': {error}"
                    break
        for found in of_all_ranks(context, failure):
            if found is not None:
                raise CheckpointError(found)

    def check_room(self, context: ParallelContext, first: int, last: int, *, snapshots: bool = False) -> None:
        """Find what lies where a run will save and was not written by one of ours; collective.

        Args:
            context: of the run.
            first, last: steps of the run, any of which may be saved.
            snapshots: whether it takes snapshots.

        Raises:
            CheckpointError: there is such a folder, of a checkpoint, a snapshot, or an export beside a checkpoint.
        """
        assert self.save_folder is not None and self.snapshot_folder is not None
        save_folder, slots = self.save_folder, self.snapshot_folder if snapshots else None

        def look() -> list[str]:
            try:
                return in_the_way(save_folder, slots, first, last, exports=self.after_save is not None)
            except OSError as error:
                return [str(error)]

        found = from_main_rank(context, look)
        if found:
            raise CheckpointError(
                f"this run saves its steps {first} to {last} in '{save_folder}', and would destroy what it has not "
                f"written:{listed(found)}\nmove that away, or set ckpt.save_ckpt_folder to another folder; to start "
                f"from a checkpoint, name it in ckpt.load_ckpt_info (doc/checkpoints.md)"
            )

    def save(self, trainer: Trainer, *, snapshot: bool = False) -> None:
        """Save this instant, or begin to; collective. What came of it is told by `poll` and `finish`.

        Raises:
            CheckpointError: the run has no folder to save to.
        """
        started = time.monotonic()
        if self.save_folder is None:
            raise CheckpointError("this run has no folder to save to: set ckpt.save_ckpt_folder")
        self.drain()
        context = self._context = trainer.context
        optimizer = trainer.engine.optimizer
        step = trainer.state.step
        tensors: dict[str, Any] = {
            **model_tensors(*optimizer.chunks),
            **optimizer_tensors(optimizer),
            f"rng/{context.rank}": random_state(),
        }
        if self._plan is None or self._plan[0] is not optimizer:
            self._plan = optimizer, make_plan(tensors, context.rank, context.world_size)
        plan = self._plan[1]
        final, writing, error = from_main_rank(context, lambda: self._begin(step, snapshot))
        if error is not None:
            self._tell(SaveResult(step, final, snapshot, time.monotonic() - started, 0.0, error))
            return
        task = SaveTask(
            step=step,
            final=final,
            writing=writing,
            is_snapshot=snapshot,
            rank=context.rank,
            world_size=context.world_size,
            files=self._files(trainer) if context.is_main_rank else None,
            save_folder=self.save_folder,
            keep_latest=self.keep_latest,
            after_save=None if snapshot else self.after_save,
        )
        planner = BoxSavePlanner()
        planner.set_up_planner(tensors, is_coordinator=context.is_main_rank)
        if self.async_save:
            self._save_in_background(task, snapshot, plan, planner, started)
        else:
            self._save_now(task, snapshot, plan, planner, started, context)

    def _begin(self, step: int, snapshot: bool) -> tuple[StoragePath, StoragePath, str | None]:
        """Where the checkpoint will be, the folder to write it into, and why there is none."""
        assert self.save_folder is not None and self.snapshot_folder is not None
        final = self.save_folder / str(step)
        try:
            if snapshot:
                final = self.snapshot_folder / self._oldest_slot(step)
            return final, folders.begin_writing(final, uuid.uuid4().hex[:8], None if snapshot else step), None
        except CheckpointError as error:
            return final, final, str(error)
        except OSError as error:
            return final, final, f"cannot prepare '{final}': {error}"

    def _oldest_slot(self, step: int) -> str:
        assert self.save_folder is not None
        # A snapshot of a later step is of another run, or was passed over: it goes first.
        snapshots = {
            found.path.name: found.step
            for found in folders.find_checkpoints(self.save_folder, self.snapshot_folder)
            if found.is_snapshot and found.step <= step
        }
        return min(folders.SNAPSHOT_SLOTS, key=lambda slot: (snapshots.get(slot, -1), slot))

    def _files(self, trainer: Trainer) -> dict[str, bytes]:
        optimizer = trainer.engine.optimizer
        state = {
            "state": asdict(trainer.state),
            "inf_nan_skip_batches": float(trainer.num_skipped_updates),
            "num_updates": optimizer.num_updates,
            "scaler": optimizer.scaler.state_dict(),
            "data": trainer.train_loader.state_dict() if isinstance(trainer.train_loader, StatefulSource) else {},
            "hooks": {hook.name: hook.state_dict() for hook in trainer.hooks},
            "world_size": trainer.context.world_size,
            "layout": trainer.context.layout.describe(),
        }
        files = {CONTEXT_FILE: json.dumps(state, indent=1), **self.files}
        return {name: text.encode() for name, text in files.items()}

    def _save_now(
        self,
        task: SaveTask,
        snapshot: bool,
        plan: RankPlan,
        planner: BoxSavePlanner,
        started: float,
        context: ParallelContext,
    ) -> None:
        part = write_part(task, plan, planner)
        parts: list[Any] | None = [part]
        if context.world_group is not None:
            parts = [None] * context.world_size if context.is_main_rank else None
            dist.gather_object(part, parts)

        def finish() -> tuple[str | None, str | None]:
            assert parts is not None and plan.metadata is not None
            try:
                complete(task, plan.metadata, parts)
            except (CheckpointError, OSError) as error:
                return str(error), None
            return None, follow_up(task)

        error, notice = from_main_rank(context, finish)
        seconds = time.monotonic() - started
        self._tell(SaveResult(task.step, task.final, snapshot, seconds, seconds, error, notice))

    def _save_in_background(
        self, task: SaveTask, snapshot: bool, plan: RankPlan, planner: BoxSavePlanner, started: float
    ) -> None:
        if self._background is None or not self._background.is_alive:
            self._background = BackgroundWriter()
        try:
            self._background.begin(task, plan, planner)
        except CheckpointError as error:
            # The main rank waits for this part; for its own, nobody does.
            if task.rank == 0:
                discard(task)
            else:
                announce_part(task, WrittenPart(task.rank, [], {}, f"rank {task.rank}: {error}"))
            self._tell(SaveResult(task.step, task.final, snapshot, time.monotonic() - started, 0.0, str(error)))
            return
        self._under_way = task, snapshot, started, time.monotonic() - started

    def poll(self) -> list[SaveResult]:
        """Saves that have ended since the last call, well or not; never waits. Only the main rank gets any."""
        if self._background is not None:
            self._take(self._background.poll())
        results, self._results = self._results, []
        return results if self._context is None or self._context.is_main_rank else []

    def drain(self, seconds: float | None = None) -> None:
        """Wait, at most so long, until this rank has written what is written in the background; not collective."""
        if self._background is not None:
            self._take(self._background.wait(seconds))

    def finish(self) -> None:
        """Wait until nothing is being written, and end the process beside this one; collective.

        Raises:
            CheckpointError: the newest save has failed.
        """
        self.drain()
        if self._background is not None:
            self._background.close()
            self._background = None
        if self._context is None:
            return
        error = from_main_rank(self._context, lambda: self._newest.error if self._newest else None)
        if error is not None:
            raise CheckpointError(f"the last checkpoint could not be saved: {error}")

    def _take(self, outcome: SaveOutcome | None) -> None:
        if outcome is None:
            return
        assert self._under_way is not None
        task, snapshot, started, stalled = self._under_way
        self._under_way = None
        self._tell(
            SaveResult(task.step, task.final, snapshot, stalled, outcome.ended - started, outcome.error, outcome.notice)
        )

    def _tell(self, result: SaveResult) -> None:
        self._results.append(result)
        self._newest = result

    # -- loading --------------------------------------------------------------------------------------------------

    def candidates(self, context: ParallelContext) -> list[FoundCheckpoint]:
        """All complete checkpoints and snapshots, by step; collective.

        The main rank looks for all: another machine may see a shared folder as it was a moment ago.

        Raises:
            CheckpointError: the folder cannot be read.
        """

        def look() -> list[FoundCheckpoint] | str:
            try:
                assert self.save_folder is not None and self.snapshot_folder is not None
                for folder in (self.save_folder, self.snapshot_folder):
                    if folder.is_local:
                        folders.put_back_replaced(folder)
                return folders.find_checkpoints(self.save_folder, self.snapshot_folder)
            except OSError as error:
                return f"cannot look for checkpoints in '{self.save_folder}': {error}"

        if self.save_folder is None:
            return []
        found = from_main_rank(context, look)
        if isinstance(found, str):
            raise CheckpointError(found)
        return found

    def warn_of_later(self, context: ParallelContext, step: int) -> None:
        """Name the checkpoints of steps after `step`, where a run starts, among which its own will lie; collective."""
        later = [str(found.path) for found in self.candidates(context) if found.step > step]
        if later:
            logger.warning(
                "this run starts at step %d, and its folder has checkpoints of later steps:%s\nthey stay until this "
                "run saves the same step (snapshots: any), and a start with ckpt.auto_resume = True takes the newest "
                "of all; to keep runs apart, set another ckpt.save_ckpt_folder",
                step,
                listed(later),
            )

    def resume(self, trainer: Trainer, check: CheckBeforeLoading | None = None) -> FoundCheckpoint | None:
        """Load the newest checkpoint that is whole; collective. Returns it, or None when there is none.

        Args:
            trainer: freshly built, before its first step.
            check: called on all ranks when the files of a checkpoint are known to be whole; may raise.

        Raises:
            CheckpointError: there are checkpoints and all are damaged, or one does not fit.
        """
        found = self.candidates(trainer.context)
        for checkpoint in reversed(found):
            try:
                manifest = check_files(checkpoint.path, trainer.context)
            except CheckpointError as error:
                logger.error("checkpoint refused, the one before is tried: %s", error)
                continue
            if check is not None:
                check(checkpoint.path, manifest, manifest.contents)
            load_run(trainer, checkpoint.path, set(manifest.contents))
            trainer.resumed_from = str(checkpoint.path)
            trainer.notify_checkpoint_loaded(checkpoint.path)
            return checkpoint
        if found:
            raise CheckpointError(
                f"none of the {len(found)} checkpoints in '{self.save_folder}' is whole: see the reasons above; to "
                f"start anew, give another ckpt.save_ckpt_folder or set ckpt.auto_resume = False"
            )
        return None

    def load(
        self,
        trainer: Trainer,
        path: StoragePath | Path | str,
        content: Iterable[str] = WHOLE_RUN,
        *,
        strict: bool = True,
        check: CheckBeforeLoading | None = None,
    ) -> None:
        """Put a checkpoint into a trainer; collective.

        Args:
            trainer: freshly built, before its first step.
            path: a checkpoint folder.
            content: any of "model", "optimizer" (moments, scaler, and together with "model" the fp32 masters),
                "scheduler" (the step, from which learning rate and beta2 follow) and "sampler" (the data cursor and
                token counter), or "all".
            strict: refuse a checkpoint that lacks a tensor of the model or has one more; otherwise say which these
                are, and leave those that are missing as they are.
            check: as in `resume`.

        Raises:
            CheckpointError: the checkpoint does not fit, is damaged, or `content` is unknown.
        """
        wanted = set(WHOLE_RUN if "all" in content else content)
        unknown = wanted - set(WHOLE_RUN)
        if unknown:
            raise CheckpointError(f"unknown checkpoint content {sorted(unknown)}; allowed: {list(WHOLE_RUN)} or 'all'")
        folder = storage_path(path) if not isinstance(path, StoragePath) else path
        manifest = check_files(folder, trainer.context)
        folders.check_contents(folder, manifest, wanted)
        if check is not None:
            check(folder, manifest, wanted)
        load_run(trainer, folder, wanted, strict=strict)
        trainer.notify_checkpoint_loaded(folder)


def _as_storage_path(path: StoragePath | Path | str | None) -> StoragePath | None:
    return path if path is None or isinstance(path, StoragePath) else storage_path(path)
