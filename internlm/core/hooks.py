"""The surface on which everything that is not the loop hangs: logging, evaluation, checkpoints, garbage collection.

The trainer calls each hook in the order given and knows none of them by name. A hook may keep state of its own, which
is saved with every checkpoint under its `name`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from internlm.core.step_metrics import StepMetrics
from internlm.utils.storage import StoragePath


@dataclass
class TrainState:
    """The counters of a run; saved with every checkpoint.

    Attributes:
        step: optimizer steps taken or skipped so far (the `batch_count` of InternEvo).
        num_consumed_samples: samples of all data ranks, the data cursor.
        num_consumed_tokens: tokens of all data ranks, padding included.
    """

    step: int = 0
    num_consumed_samples: int = 0
    num_consumed_tokens: int = 0


@dataclass(frozen=True)
class SaveResult:
    """What became of a save.

    Attributes:
        step: what was saved.
        path: its folder.
        snapshot: whether it is one of the rotating snapshots.
        seconds_stalled: how long training stood still for it.
        seconds_written: from its beginning until it was complete.
        error: why it failed, in one line; None when it is complete.
        notice: what else went wrong, after it was complete.
    """

    step: int
    path: StoragePath
    snapshot: bool
    seconds_stalled: float
    seconds_written: float
    error: str | None = None
    notice: str | None = None


class RunningTrainer(Protocol):
    """What a hook may use of the trainer."""

    state: TrainState
    total_steps: int
    run_dir: Path
    is_main_rank: bool
    """True on the one rank that writes to the console, metrics files and TensorBoard."""
    resumed_from: str | None
    """The checkpoint that this run goes on from, for people; None when there is none."""

    @property
    def stop_reason(self) -> str | None:
        """Why the loop is left before its end; None when it goes on or has reached it."""

    @property
    def save_reason(self) -> str | None:
        """Why someone wants the step just counted saved; None when nobody does. The same on all ranks."""

    def evaluate(self) -> dict[str, float]:
        """Run every valid set on all its tokens; all ranks must call it. Returns `val/<set>_loss`, `_acc`, `_plex`. A
        set that cannot be read is told as an error and left out."""

    def save_checkpoint(self, *, snapshot: bool = False) -> None:
        """Save this instant, or begin to; all ranks must call it. What becomes of it comes from `poll_saves`."""

    def poll_saves(self) -> list[SaveResult]:
        """The saves that ended since the last call, well or not; never waits. Only the main rank gets any."""

    def finish_saving(self) -> None:
        """Wait for the saves under way; all ranks must call it. Raises CheckpointError when the newest one failed."""

    def drain_saves(self, seconds: float) -> None:
        """Wait, no longer than that, for this rank's saves under way. Not collective, for after an exception."""

    def request_stop(self, reason: str) -> None:
        """Leave the loop soon, on all ranks at the same step; a final checkpoint is saved. Any rank may call it."""

    def request_save(self, reason: str) -> None:
        """Save a checkpoint soon, on all ranks at the same step. Any rank may call it."""

    def request_at(self, step: int) -> None:
        """Save and stop at `step`; below 0, save at step -`step`; 0 takes it back. Only the main rank may call it."""


class Hook:
    """Base of all hooks; every method does nothing. All ranks call all methods at the same points."""

    name = "hook"

    def on_fit_start(self, trainer: RunningTrainer) -> None:
        """Called once, after a checkpoint was (or was not) loaded and before the first step."""

    def on_step_start(self, trainer: RunningTrainer) -> None:
        """Called before the batch of a step is loaded."""

    def on_step_end(self, trainer: RunningTrainer, metrics: StepMetrics) -> None:
        """Called after the optimizer step, so not where a batch was skipped. `trainer.state.step` counts this step."""

    def on_step_counted(self, trainer: RunningTrainer) -> None:
        """Called at the end of every step, trained or skipped, after all `on_step_end`: for what is due by number."""

    def on_evaluation_end(self, trainer: RunningTrainer, results: dict[str, float]) -> None:
        """Called after an evaluation; `results` maps `val/<set>_loss`, `_acc`, `_plex` to numbers."""

    def on_save_start(self, trainer: RunningTrainer) -> None:
        """Called before a checkpoint of this instant is taken. A run killed later may go on from here: write now what
        must not be lost."""

    def on_checkpoint_saved(self, trainer: RunningTrainer, path: StoragePath) -> None:
        """Called when a checkpoint is complete, on the main rank only; with saves in the background, steps later."""

    def on_exception(self, trainer: RunningTrainer, error: BaseException) -> None:
        """Called when an exception leaves the loop, before the process ends; must not raise."""

    def on_fit_end(self, trainer: RunningTrainer) -> None:
        """Called once when the loop is left, also on a stop request; not after an exception."""

    def state_dict(self) -> dict[str, Any]:
        """State to save with a checkpoint (picklable without torch objects)."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
