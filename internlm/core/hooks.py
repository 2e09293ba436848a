"""The protocol between the training loop and its hooks: logging, evaluation, checkpoints, and hooks of a user.

The trainer calls each hook in the order given and knows none by name. Every checkpoint holds the state of each hook,
under its `name`. doc/hooks.md has complete examples, and shows how a config adds a hook.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from internlm.core.context.parallel_context import ParallelContext
from internlm.core.engine import Engine
from internlm.core.step_metrics import StepMetrics
from internlm.utils.storage import StoragePath


@dataclass
class TrainState:
    """The counters of a run; saved with every checkpoint.

    Attributes:
        step: optimizer steps taken or skipped so far (`batch_count` in InternEvo).
        num_consumed_samples: samples of all data ranks; the data cursor.
        num_consumed_tokens: tokens of all data ranks, padding included.
    """

    step: int = 0
    num_consumed_samples: int = 0
    num_consumed_tokens: int = 0


@dataclass(frozen=True)
class SaveResult:
    """The outcome of a save.

    Attributes:
        step: the step that was saved.
        path: folder of the checkpoint.
        snapshot: whether it is one of the rotating snapshots.
        seconds_stalled: how long training waited for it.
        seconds_written: from its start until it was complete.
        error: why it failed, in one line; None when it is complete.
        notice: a problem that occurred after it was complete.
    """

    step: int
    path: StoragePath
    snapshot: bool
    seconds_stalled: float
    seconds_written: float
    error: str | None = None
    notice: str | None = None


class RunningTrainer(Protocol):
    """The part of the trainer that hooks may use."""

    state: TrainState
    total_steps: int
    run_dir: Path
    is_main_rank: bool
    """True on the one rank that writes to the console, metrics files and TensorBoard."""
    resumed_from: str | None
    """The checkpoint that this run continues, for display; None when there is none."""
    engine: Engine
    """Holds the model (`engine.chunks`, this rank's parts of it) and the optimizer (`engine.optimizer`)."""
    context: ParallelContext
    """This rank's position and process groups."""

    @property
    def stop_reason(self) -> str | None:
        """Why the loop ends early; None when it does not."""

    @property
    def save_reason(self) -> str | None:
        """Why a save of the step just counted was requested; None when it was not. The same on all ranks."""

    def evaluate(self) -> dict[str, float]:
        """Evaluate every valid set on all its tokens; collective.

        Returns:
            `val/<set>_loss`, `_acc`, `_plex` and, if known, `_bpb`. A set that cannot be read is logged as an error and
            left out.
        """

    def save_checkpoint(self, *, snapshot: bool = False) -> None:
        """Save the current state, or start to; collective. `poll_saves` returns the outcome."""

    def poll_saves(self) -> list[SaveResult]:
        """The saves that ended since the last call, successful or not; never waits. Empty except on the main rank."""

    def finish_saving(self) -> None:
        """Wait for all saves in progress; collective. Raises CheckpointError when the newest one failed."""

    def drain_saves(self, seconds: float) -> None:
        """Wait at most `seconds` for this rank's saves in progress. Not collective; for use after an exception."""

    def request_stop(self, reason: str) -> None:
        """Leave the loop soon, on all ranks at the same step, with a final checkpoint. Any rank may call it."""

    def request_save(self, reason: str) -> None:
        """Save a checkpoint soon, on all ranks at the same step. Any rank may call it."""

    def request_at(self, step: int) -> None:
        """Save and stop at `step`; below 0, save at step -`step`; 0 cancels. For the main rank only."""


class Hook:
    """Base of all hooks; every method does nothing. All ranks call all methods at the same points.

    Attributes:
        name: unique among the hooks of a run; key of the hook's state in checkpoints.
    """

    name = "hook"

    def on_checkpoint_loaded(self, trainer: RunningTrainer, path: StoragePath) -> None:
        """Called after weights (or a whole run, see `trainer.resumed_from`) were loaded from `path`.

        That is after `load_state_dict` and before `on_fit_start`.
        """

    def on_fit_start(self, trainer: RunningTrainer) -> None:
        """Called once before the first step, whether or not a checkpoint was loaded."""

    def on_step_start(self, trainer: RunningTrainer) -> None:
        """Called before the batch of a step is loaded."""

    def on_before_optimizer_step(self, trainer: RunningTrainer) -> None:
        """Called after the last backward pass of a step; not for a skipped batch.

        `trainer.engine.optimizer.sharded_gradients()` yields this rank's shard of the gradients, which are summed over
        all ranks and micro-batches and not clipped yet. `trainer.state.step` does not count this step yet.
        """

    def on_after_optimizer_step(self, trainer: RunningTrainer) -> None:
        """Called when weights and optimizer state are updated (or the update was skipped for a non-finite gradient).

        Call `trainer.engine.optimizer.finish_gathering()` before reading weights. `trainer.state.step` does not count
        this step yet.
        """

    def on_step_end(self, trainer: RunningTrainer, metrics: StepMetrics) -> None:
        """Called after the optimizer step; not for a skipped batch. `trainer.state.step` counts this step."""

    def on_step_counted(self, trainer: RunningTrainer) -> None:
        """Called at the end of every step, trained or skipped, after all `on_step_end`; for work due at a step."""

    def on_evaluation_end(self, trainer: RunningTrainer, results: dict[str, float]) -> None:
        """Called after an evaluation; `results` maps `val/<set>_loss`, `_acc`, `_plex`, `_bpb` to numbers."""

    def on_save_start(self, trainer: RunningTrainer) -> None:
        """Called before a checkpoint of the current state: write now whatever must survive a resume from it."""

    def on_checkpoint_saved(self, trainer: RunningTrainer, path: StoragePath) -> None:
        """Called when a checkpoint is complete, on the main rank only; for a background save, steps later."""

    def on_exception(self, trainer: RunningTrainer, error: BaseException) -> None:
        """Called when an exception leaves the loop, before the process ends; an exception of a hook is logged."""

    def on_fit_end(self, trainer: RunningTrainer) -> None:
        """Called once when the loop ends, also after a stop request; not after an exception."""

    def state_dict(self) -> dict[str, Any]:
        """State to save with every checkpoint, as JSON values; the main rank's is saved.

        Tuples are restored as lists. The main rank also calls it after `on_fit_start`, to check the values.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, on every rank."""


def overrides(hook: Hook, event: str) -> bool:
    """Whether a hook defines a method of `Hook` itself, in its class or as an attribute of its own."""
    return getattr(getattr(hook, event), "__func__", None) is not getattr(Hook, event)
