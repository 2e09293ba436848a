"""Saving and resuming a run.

A checkpoint holds global tensors: weights under `model/<name>`, optimizer state under `optimizer/<kind>/<name>`, and
the random state of each rank under `rng/<rank>`. `context.json` has the counters, the data cursor, the loss scaler and
the state of the hooks. Only the random state depends on the layout that wrote it.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from internlm.checkpoint.background import BackgroundWriter, SaveOutcome
from internlm.checkpoint.boxed_tensor import BoxSavePlanner
from internlm.checkpoint.manifest import WHOLE_RUN, Manifest, check_contents
from internlm.checkpoint.reading import CONTEXT_FILE, check_files, listed
from internlm.checkpoint.run_state import (
    counters_of,
    data_state_of,
    load_run,
    model_tensors,
    optimizer_tensors,
)
from internlm.checkpoint.save_folder import (
    FoundCheckpoint,
    begin_writing,
    find_checkpoints,
    oldest_slot,
    restore_replaced,
)
from internlm.checkpoint.save_folder_checks import check_overwrites, check_writable
from internlm.checkpoint.saving import (
    RankPlan,
    SaveTask,
    WrittenPart,
    announce_part,
    discard,
    make_plan,
    save_together,
)
from internlm.core.communication.objects import from_main_rank
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
"""Called with (checkpoint, its manifest, the parts to load)."""


class CheckpointManager:
    """Saves and restores the whole state of a trainer.

    Args:
        save_folder: gets one folder per saved step; local or in an object store. None: the run cannot save.
        files: name -> text, written into every checkpoint (the config, for other tools).
        snapshot_folder: holds the two newest snapshots; None: `<save_folder>/snapshot`.
        keep_latest: number of complete checkpoints to keep; None keeps all.
        async_save: write in a background process while training continues.
        after_save: a module-level function, called with each complete checkpoint (not with snapshots), on the main rank
            or in its background process.
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
        # Started early, so that it is ready for the first save.
        self._background = BackgroundWriter() if async_save else None
        self._in_progress: tuple[SaveTask, float, float] | None = None
        self._results: list[SaveResult] = []
        self._newest: SaveResult | None = None
        self._context: ParallelContext | None = None

    # -- saving ---------------------------------------------------------------------------------------------------

    def check_writable(self, context: ParallelContext) -> None:
        """Check that every machine of the job can write the folders; collective.

        Raises:
            CheckpointError: a machine cannot.
        """
        check_writable(self._roots, context)

    def check_room(self, context: ParallelContext, first: int, last: int, *, snapshots: bool = False) -> None:
        """Check that the saves of a run will overwrite nothing but checkpoints; collective.

        See `check_overwrites`; `snapshots` tells whether the run saves snapshots.

        Raises:
            CheckpointError: a save would overwrite something else.
        """
        assert self.save_folder is not None
        slots = self.snapshot_folder if snapshots else None
        check_overwrites(self.save_folder, slots, first, last, context, exports=self.after_save is not None)

    def save(self, trainer: Trainer, *, snapshot: bool = False) -> None:
        """Save the current state, or start to in the background; collective. `poll` and `finish` report the outcome.

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
            self._report(SaveResult(step, final, snapshot, time.monotonic() - started, 0.0, error))
            return
        data = data_state_of(trainer)
        task = SaveTask(
            step=step,
            final=final,
            writing=writing,
            is_snapshot=snapshot,
            rank=context.rank,
            world_size=context.world_size,
            files=self._small_files(trainer, data) if context.is_main_rank else None,
            save_folder=self.save_folder,
            keep_latest=self.keep_latest,
            after_save=None if snapshot else self.after_save,
        )
        planner = BoxSavePlanner()
        planner.set_up_planner(tensors, is_coordinator=context.is_main_rank)
        if self.async_save:
            self._save_in_background(task, plan, planner, started)
        else:
            error, notice = save_together(task, plan, planner, context)
            seconds = time.monotonic() - started
            self._report(SaveResult(step, final, snapshot, seconds, seconds, error, notice))

    def _small_files(self, trainer: Trainer, data: dict[str, Any]) -> dict[str, bytes]:
        files = {CONTEXT_FILE: json.dumps(counters_of(trainer, data), indent=1), **self.files}
        return {name: text.encode() for name, text in files.items()}

    def _begin(self, step: int, snapshot: bool) -> tuple[StoragePath, StoragePath, str | None]:
        """(final folder, folder to write into, error or None)."""
        assert self.save_folder is not None and self.snapshot_folder is not None
        final = self.save_folder / str(step)
        try:
            if snapshot:
                final = oldest_slot(self.save_folder, self.snapshot_folder, step)
            return final, begin_writing(final, uuid.uuid4().hex[:8], None if snapshot else step), None
        except CheckpointError as error:
            return final, final, str(error)
        except OSError as error:
            return final, final, f"cannot prepare '{final}': {error}"

    def _save_in_background(self, task: SaveTask, plan: RankPlan, planner: BoxSavePlanner, started: float) -> None:
        if self._background is None or not self._background.is_alive:
            self._background = BackgroundWriter()
        try:
            self._background.begin(task, plan, planner)
        except CheckpointError as error:
            # The main rank only waits for other ranks' parts, so it need not announce its own.
            if task.rank == 0:
                discard(task)
            else:
                announce_part(task, WrittenPart(task.rank, [], {}, f"rank {task.rank}: {error}"))
            stalled = time.monotonic() - started
            self._report(SaveResult(task.step, task.final, task.is_snapshot, stalled, 0.0, str(error)))
            return
        self._in_progress = task, started, time.monotonic() - started

    def poll(self) -> list[SaveResult]:
        """The saves that ended since the last call, successful or not; never waits. Empty but on the main rank."""
        if self._background is not None:
            self._finish_background(self._background.poll())
        results, self._results = self._results, []
        return results if self._context is None or self._context.is_main_rank else []

    def drain(self, seconds: float | None = None) -> None:
        """Wait, at most `seconds`, for this rank's save in the background; not collective."""
        if self._background is not None:
            self._finish_background(self._background.wait(seconds))

    def finish(self) -> None:
        """Wait for all saves in progress and end the background process; collective.

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

    def _finish_background(self, outcome: SaveOutcome | None) -> None:
        if outcome is None:
            return
        assert self._in_progress is not None
        (task, started, stalled), self._in_progress = self._in_progress, None
        result = SaveResult(task.step, task.final, task.is_snapshot, stalled, outcome.ended - started)
        self._report(replace(result, error=outcome.error, notice=outcome.notice))

    def _report(self, result: SaveResult) -> None:
        self._results.append(result)
        self._newest = result

    # -- loading --------------------------------------------------------------------------------------------------

    def candidates(self, context: ParallelContext) -> list[FoundCheckpoint]:
        """All complete checkpoints and snapshots, by step; collective.

        Only the main rank lists the folder: other machines may see an earlier state of a shared file system.

        Raises:
            CheckpointError: the folder cannot be read.
        """

        def look() -> list[FoundCheckpoint] | str:
            try:
                assert self.save_folder is not None and self.snapshot_folder is not None
                for folder in (self.save_folder, self.snapshot_folder):
                    if folder.is_local:
                        restore_replaced(folder)
                return find_checkpoints(self.save_folder, self.snapshot_folder)
            except OSError as error:
                return f"cannot look for checkpoints in '{self.save_folder}': {error}"

        if self.save_folder is None:
            return []
        found = from_main_rank(context, look)
        if isinstance(found, str):
            raise CheckpointError(found)
        return found

    def warn_of_later(self, context: ParallelContext, step: int) -> None:
        """Warn if the save folder has checkpoints later than `step`, where the run starts; collective."""
        later = [str(found.path) for found in self.candidates(context) if found.step > step]
        if later:
            logger.warning(
                "this run starts at step %d, and its folder has checkpoints of later steps:%s\nthey remain until "
                "this run saves the same step (snapshots: any step), and ckpt.auto_resume = True resumes from the "
                "newest of all; to separate the runs, set another ckpt.save_ckpt_folder",
                step,
                listed(later),
            )

    def resume(self, trainer: Trainer, check: CheckBeforeLoading | None = None) -> FoundCheckpoint | None:
        """Load the newest undamaged checkpoint; collective. Returns it, or None when there is none.

        Args:
            trainer: freshly built, before its first step.
            check: called on all ranks once the files of a checkpoint are verified; may raise.

        Raises:
            CheckpointError: there are checkpoints and all are damaged, or one does not fit.
        """
        found = self.candidates(trainer.context)
        for checkpoint in reversed(found):
            try:
                manifest = check_files(checkpoint.path, trainer.context)
            except CheckpointError as error:
                logger.error("checkpoint refused, trying the previous one: %s", error)
                continue
            if check is not None:
                check(checkpoint.path, manifest, manifest.contents)
            load_run(trainer, checkpoint.path, set(manifest.contents))
            trainer.resumed_from = str(checkpoint.path)
            trainer.notify_checkpoint_loaded(checkpoint.path)
            return checkpoint
        if found:
            raise CheckpointError(
                f"none of the {len(found)} checkpoints in '{self.save_folder}' is intact: see the reasons above; "
                f"to start from scratch, set another ckpt.save_ckpt_folder or ckpt.auto_resume = False"
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
        """Load a checkpoint into a trainer; collective.

        Args:
            trainer: freshly built, before its first step.
            path: a checkpoint folder.
            content: any of "model", "optimizer" (moments, scaler, and together with "model" the fp32 masters),
                "scheduler" (the step, from which learning rate and beta2 follow) and "sampler" (the data cursor and
                token counter), or "all".
            strict: refuse missing or unknown weights; otherwise log them and leave missing ones unchanged.
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
        check_contents(folder, manifest, wanted)
        if check is not None:
            check(folder, manifest, wanted)
        load_run(trainer, folder, wanted, strict=strict)
        trainer.notify_checkpoint_loaded(folder)


def _as_storage_path(path: StoragePath | Path | str | None) -> StoragePath | None:
    return path if path is None or isinstance(path, StoragePath) else storage_path(path)
