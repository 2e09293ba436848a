"""The training loop: loads batches, runs the engine, calls hooks. It knows no hook by name."""

from __future__ import annotations

import datetime
import functools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from internlm.core.batch_source import BatchSource, ClosableSource, SeekableSource
from internlm.core.communication.collectives import all_reduce, all_reduce_async
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.engine import Engine
from internlm.core.hook_checks import find_problem, state_of
from internlm.core.hooks import Hook, SaveResult, TrainState, overrides
from internlm.core.position_buckets import NUM_BUCKETS, typed_by_position
from internlm.core.run_control import RunControl, SignalRequests
from internlm.core.step_metrics import StepMetrics
from internlm.core.synchronized_reading import read_together
from internlm.core.token_statistics import TokenSums, evaluation_results
from internlm.data.batch import Batch
from internlm.data.documents.label_bytes import LabelBytes
from internlm.utils.errors import DataError
from internlm.utils.logging import get_logger
from internlm.utils.storage import StoragePath

logger = get_logger(__name__)

END_OF_DATA_TIMEOUT = datetime.timedelta(minutes=5)
"""How long a rank whose data ended waits for the data of the others to end: longer than any step and load."""


class Checkpointer(Protocol):
    """Saves the run; implemented by `internlm.checkpoint.manager.CheckpointManager`."""

    def save(self, trainer: Trainer, *, snapshot: bool = False) -> None: ...

    def poll(self) -> list[SaveResult]: ...

    def finish(self) -> None: ...

    def drain(self, seconds: float) -> None: ...


class ScoredSet(Protocol):
    """A set of examples with metrics of its own; implemented by `internlm.eval.multiple_choice.MultipleChoice`."""

    def evaluate(self, engine: Engine) -> dict[str, float]:
        """Name -> metric over all examples; collective, the same on all ranks."""


class Trainer:
    """Runs an engine over batches until `total_steps`.

    Args:
        engine: runs one optimization step.
        train_loader: this data rank's batches, as many as on every other data rank. The optional protocols of
            `core/batch_source.py` that it implements are used too: `SeekableSource` at the start, `ClosableSource` at
            the end, and `StatefulSource` in checkpoints.
        total_steps: steps of the whole run, including those before a resume.
        lr: schedule position (0 for the first step) -> learning rate.
        schedules: name of another hyper-parameter of the optimizer -> its value by schedule position; the rest stay
            constant.
        advance: what advances the schedule position: every step, or only updates. With "update", neither a skipped
            update nor a skipped batch advances it.
        hooks: called in this order.
        run_dir: folder for the output of the run.
        valid_sets: name -> batches of this data rank, as many micro-batches as on every other data rank.
        scored_sets: name -> examples that each evaluation scores.
        label_bytes: name of a valid set -> labels and bytes of all data ranks, for bits per byte.
        evaluates_by_position: whether an evaluation also gives the loss by position.
        counts_bad_documents: whether the metric "bad_documents" counts what batches list as unreadable, over all data
            ranks since the start of the run.
        checkpointer: saves the run; None disables saving.
        is_skipped: step (0 for the first) -> whether its batch is skipped. A skipped batch has no metrics, but counts
            as a step: periodic saves and evaluations are not affected.
    """

    def __init__(
        self,
        engine: Engine,
        train_loader: BatchSource,
        *,
        total_steps: int,
        lr: Callable[[int], float],
        schedules: Mapping[str, Callable[[int], float]] | None = None,
        advance: Literal["step", "update"] = "step",
        hooks: Sequence[Hook] = (),
        run_dir: Path | str = "runs/anonymous",
        valid_sets: Mapping[str, Iterable[Batch]] | None = None,
        scored_sets: Mapping[str, ScoredSet] | None = None,
        label_bytes: Mapping[str, LabelBytes] | None = None,
        evaluates_by_position: bool = False,
        counts_bad_documents: bool = False,
        checkpointer: Checkpointer | None = None,
        is_skipped: Callable[[int], bool] = lambda step: False,
    ) -> None:
        self.engine = engine
        self.context: ParallelContext = engine.context
        self.train_loader = train_loader
        self.total_steps = total_steps
        self.schedules = {"lr": lr, **(schedules or {})}
        self.advance = advance
        self.num_known_updates = 0
        """Updates up to the step before the last one; whether the last one was skipped is not on the host yet."""
        self._last_step: StepMetrics | None = None
        self.hooks = list(hooks)
        repeated = [name for name, count in Counter(hook.name for hook in self.hooks).items() if count > 1]
        if repeated:
            raise ValueError(f"two hooks are named '{repeated[0]}': the state of a hook is saved under its name")
        for reason in filter(None, map(find_problem, self.hooks)):
            raise ValueError(reason)
        self.run_dir = Path(run_dir)
        self.valid_sets = dict(valid_sets or {})
        self.scored_sets = dict(scored_sets or {})
        self.label_bytes = dict(label_bytes or {})
        self.evaluates_by_position = evaluates_by_position
        self.checkpointer = checkpointer
        self.is_skipped = is_skipped
        self.state = TrainState()
        self.is_main_rank = self.context.is_main_rank
        self.resumed_from: str | None = None
        self.num_skipped_updates = torch.zeros((), dtype=torch.float32, device=self.context.device)
        self.counts_bad_documents = counts_bad_documents
        self.num_bad_documents = torch.zeros((), dtype=torch.float64, device=self.context.device)
        self.progress = engine.progress
        self.run_control = RunControl(self.context.world_group)

    # -- the loop -------------------------------------------------------------------------------------------------

    def fit(self) -> TrainState:
        """Train until `total_steps`, the end of the data or a stop request. A second call continues.

        Returns:
            The counters at the end.

        Raises:
            DataError: the data of this rank ended before that of another rank.
        """
        self.run_control.clear()
        with SignalRequests(self.run_control):
            try:
                self._call("on_fit_start")
                if self.checkpointer is not None and self.is_main_rank:
                    self.hook_states()  # what cannot be saved must not cost the steps up to the first save
                self._loop()
                self.run_control.finish()
                # Hooks and the caller may read the weights of the last update.
                self.engine.optimizer.finish_gathering()
                if self.stop_reason is not None:
                    logger.warning("stopping after step %d: %s", self.state.step, self.stop_reason)
                self._call("on_fit_end")
            except BaseException as error:
                self._notify_exception(error)
                raise
            finally:
                if isinstance(self.train_loader, ClosableSource):
                    self.train_loader.close()
        return self.state

    def _loop(self) -> None:
        if isinstance(self.train_loader, SeekableSource):
            self.train_loader.seek(self.state.step, self.state.num_consumed_samples)
        batches = iter(self.train_loader)
        while self.state.step < self.total_steps and self.run_control.stop_reason is None:
            started = time.perf_counter()
            self.progress.begin_step(self.state.step + 1)
            self._call("on_step_start")
            self.progress.mark("loading a batch")
            loading = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                self._wait_for_the_end_of_all_data()
                logger.warning("the training data ended at step %d of %d", self.state.step, self.total_steps)
                return
            data_seconds = time.perf_counter() - loading
            if self.is_skipped(self.state.step):
                self._count(batch)
                logger.info("step %d: batch skipped as configured", self.state.step)
            else:
                metrics = self._train_step(batch)
                metrics.seconds.update(data=data_seconds, total=time.perf_counter() - started)
                self._call("on_step_end", metrics)
            self.progress.mark("agreeing on saves and stops")
            self.run_control.agree(self.state.step)
            if self.save_reason is not None and self.checkpointer is None and self.is_main_rank:
                logger.warning("step %d: %s, but this run saves nothing", self.state.step, self.save_reason)
            self._call("on_step_counted")

    def _train_step(self, batch: Batch) -> StepMetrics:
        self.progress.mark("training step")
        position = functools.cache(self._schedule_position)

        def hyper_parameters() -> dict[str, float]:
            return {name: schedule(position()) for name, schedule in self.schedules.items()}

        if self._listens("on_before_optimizer_step"):
            before = functools.partial(self._call, "on_before_optimizer_step")
            result = self.engine.train_step(batch, hyper_parameters, before_optimizer_step=before)
        else:
            result = self.engine.train_step(batch, hyper_parameters)
        if self._listens("on_after_optimizer_step"):
            self._call("on_after_optimizer_step")
        self.num_skipped_updates = self.num_skipped_updates + result.skipped
        extra = dict(result.statistics)
        if self.counts_bad_documents:
            count = torch.full_like(self.num_bad_documents, len(batch.unreadable))
            self.num_bad_documents = self.num_bad_documents + all_reduce(count, self.context.group("data"))
            extra["bad_documents"] = self.num_bad_documents
        num_tokens = self._count(batch)
        documents = batch.num_documents
        metrics = StepMetrics(
            step=self.state.step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            skipped=result.skipped,
            hyper_parameters=self.engine.optimizer.hyper_parameters,
            loss_scale=result.loss_scale,
            num_valid_tokens=result.num_valid_tokens,
            num_tokens=num_tokens,
            num_documents=sum(documents),
            micro_num=len(batch.micro_batches),
            largest_length=max(max(lengths) for lengths in batch.segment_lengths),
            largest_batch=max(documents),
            smallest_batch=min(documents),
            num_consumed_tokens=self.state.num_consumed_tokens,
            num_consumed_samples=self.state.num_consumed_samples,
            inf_nan_skip_batches=self.num_skipped_updates,
            num_pictures=batch.num_pictures * self.context.size("data"),
            seconds=dict(result.seconds),
            extra=extra,
        )
        if self.advance == "update":
            metrics.start_copy()
            self._last_step = metrics
        return metrics

    def _schedule_position(self) -> int:
        """Position of the learning rate and beta2 schedules in the current step."""
        if self.advance == "step":
            return self.state.step
        if self._last_step is not None:
            self.num_known_updates += 0 if self._last_step.numbers()["skipped"] else 1
            self._last_step = None
        return self.num_known_updates

    def _count(self, batch: Batch) -> int:
        """Advance the counters by one batch; returns its number of tokens over all data ranks."""
        num_tokens = batch.num_tokens * self.context.size("data")
        self.state.step += 1
        self.state.num_consumed_samples += batch.num_samples
        self.state.num_consumed_tokens += num_tokens
        return num_tokens

    def _notify_exception(self, error: BaseException) -> None:
        """Call `on_exception` of every hook; one that raises hides neither the cause nor the call from the others."""
        for hook in self.hooks:
            try:
                hook.on_exception(self, error)
            except Exception:
                logger.exception("hook '%s' raised in on_exception", hook.name)

    def hook_states(self) -> dict[str, dict[str, Any]]:
        """The state of each hook, by name, for a checkpoint.

        Raises:
            CheckpointError: a state is not a dict of JSON values.
        """
        states = {}
        for hook in self.hooks:
            self.progress.mark(f"{hook.name}: state_dict")
            states[hook.name] = state_of(hook)
        return states

    def _listens(self, event: str) -> bool:
        return any(overrides(hook, event) for hook in self.hooks)

    def notify_checkpoint_loaded(self, path: StoragePath) -> None:
        """Call `on_checkpoint_loaded` of every hook. For code that has loaded a checkpoint into this trainer."""
        self._call("on_checkpoint_loaded", path)

    def _call(self, event: str, *args: Any) -> None:
        for hook in self.hooks:
            self.progress.mark(f"{hook.name}: {event}")
            getattr(hook, event)(self, *args)

    # -- methods for hooks ----------------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, float]:
        """Evaluate every valid set on all its tokens; collective.

        A set that some rank cannot read, or that has no label, is logged as an error and left out on all ranks. An
        exception of the model is not caught, because other ranks may be waiting in its collectives.

        Returns:
            `val/<set>_loss` (mean over valid tokens), `val/<set>_acc` and `val/<set>_plex` of each set, and
            `val/<set>_bpb` (bits per byte of text) where `label_bytes` has it; with `evaluates_by_position` also the
            loss of each bucket of positions, see `evaluation_results`. `val/<set>_<metric>` of each scored set.
        """
        results: dict[str, float] = {}
        by_position = self.evaluates_by_position
        for name, batches in self.valid_sets.items():
            try:
                with self.progress.announce(f"evaluation of '{name}'"):
                    sums = self._evaluate_set(batches)
                    size = self.label_bytes.get(name)
                    reduce = self.engine.sum_over_tokens
                    results.update(evaluation_results(name, sums, reduce, size, by_position=by_position))
            except DataError as error:
                logger.error("step %d: '%s' was not evaluated: %s; the run goes on", self.state.step, name, error)
        for name, scored in self.scored_sets.items():
            with self.progress.announce(f"evaluation of '{name}'"):
                results |= {f"val/{name}_{metric}": value for metric, value in scored.evaluate(self.engine).items()}
        if results:
            self._call("on_evaluation_end", results)
        return results

    def _evaluate_set(self, batches: Iterable[Batch]) -> TokenSums:
        """Sums over this rank's tokens of a valid set. Raises DataError on all ranks or none."""
        by_position = self.evaluates_by_position
        sums = TokenSums(num_types=NUM_BUCKETS if by_position else 1, device=self.context.device)
        for batch in read_together(batches, self.context):
            for micro_batch in batch.micro_batches:
                self.engine.evaluate(typed_by_position(micro_batch) if by_position else micro_batch, sums)
        return sums

    def save_checkpoint(self, *, snapshot: bool = False) -> None:
        """Save the current state, or start a background save of it; collective.

        A failed save does not raise; `poll_saves` returns the outcome.

        Raises:
            ValueError: the trainer has no checkpointer.
        """
        checkpointer = self._needed_checkpointer()
        self._call("on_save_start")
        with self.progress.announce("saving a checkpoint"):
            checkpointer.save(self, snapshot=snapshot)

    def poll_saves(self) -> list[SaveResult]:
        """The saves that completed or failed since the last call, on the main rank; empty elsewhere. Never waits.

        Calls `on_checkpoint_saved` for each complete one.
        """
        results = self._needed_checkpointer().poll()
        for result in results:
            if result.error is None:
                self._call("on_checkpoint_saved", result.path)
        return results

    def finish_saving(self) -> None:
        """Wait for the saves in progress; collective.

        Raises:
            CheckpointError: the newest one failed.
        """
        checkpointer = self._needed_checkpointer()
        with self.progress.announce("waiting for a checkpoint to be written"):
            checkpointer.finish()

    def drain_saves(self, seconds: float) -> None:
        """Wait at most `seconds` for this rank's saves in progress. Not collective: for use after an exception."""
        self._needed_checkpointer().drain(seconds)

    def _needed_checkpointer(self) -> Checkpointer:
        if self.checkpointer is None:
            raise ValueError("this trainer has no checkpointer")
        return self.checkpointer

    def request_stop(self, reason: str) -> None:
        """Leave the loop after at most two more steps, on all ranks at the same step. Any rank may call it."""
        self.run_control.request_stop(reason)

    def request_save(self, reason: str) -> None:
        """Save a checkpoint after at most two more steps, on all ranks at the same step. Any rank may call it."""
        self.run_control.request_save(reason)

    def request_at(self, step: int) -> None:
        """Save and stop at `step`; a negative `step` saves at step `-step`, 0 withdraws the request. Main rank only."""
        self.run_control.request_at(step)

    @property
    def stop_reason(self) -> str | None:
        """Why training stops before `total_steps`; None if it continues or has reached them."""
        return None if self.state.step >= self.total_steps else self.run_control.stop_reason

    @property
    def save_reason(self) -> str | None:
        """Why a save of the step just counted was requested; None without a request. Set on all ranks or none."""
        return self.run_control.save_reason

    def _wait_for_the_end_of_all_data(self) -> None:
        """Wait until the data of every rank has ended.

        Otherwise the remaining ranks would hang in the collectives of their next step until a timeout that does not
        name the reason.
        """
        if self.context.world_group is None:
            return
        vote = all_reduce_async(torch.ones(()), self.context.world_group)
        try:
            vote.wait(END_OF_DATA_TIMEOUT)
        except RuntimeError as error:
            raise DataError(
                f"the training data of rank {self.context.rank} ended at step {self.state.step} of {self.total_steps}, "
                f"but that of another rank did not: give every rank the same number of batches"
            ) from error
