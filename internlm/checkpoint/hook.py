"""Decides when to save and logs the outcome; `internlm.checkpoint.manager` does the saving."""

from __future__ import annotations

from internlm.core.hooks import Hook, RunningTrainer, SaveResult
from internlm.utils.errors import CheckpointError
from internlm.utils.logging import get_logger

logger = get_logger(__name__)

DRAIN_SECONDS = 600.0
"""How long a run that ends with an exception waits for a save in the background."""


class CheckpointHook(Hook):
    """Saves every `every` steps, on request, and after the last step of the run.

    A failed save is logged and the run continues; only the save of the last step must succeed. Place the hook before
    hooks that may fail or take long in `on_step_counted`, such as evaluation, so that the step is saved by then.

    Args:
        every: steps between checkpoints.
        snapshot_every: steps between snapshots, which are skipped where a checkpoint is due; None: no snapshots.
    """

    name = "checkpoint"

    def __init__(self, every: int, snapshot_every: int | None = None) -> None:
        self.every = every
        self.snapshot_every = snapshot_every
        self._saved_step = -1
        self._newest: str | None = None
        self._num_failures = 0

    def on_fit_start(self, trainer: RunningTrainer) -> None:
        # Neither a checkpoint just loaded nor an untrained model is saved.
        self._saved_step = trainer.state.step
        self._newest = self._newest or trainer.resumed_from

    def on_step_counted(self, trainer: RunningTrainer) -> None:
        self._report(trainer)
        step = trainer.state.step
        if trainer.save_reason is not None:
            logger.info("step %d: saving a checkpoint: %s", step, trainer.save_reason)
        is_last = step == trainer.total_steps or trainer.stop_reason is not None
        if step % self.every == 0 or trainer.save_reason is not None or is_last:
            self._save(trainer, continues=not is_last)
        elif self._snapshot_is_due(step):
            trainer.save_checkpoint(snapshot=True)
            self._report(trainer)

    def on_fit_end(self, trainer: RunningTrainer) -> None:
        if trainer.state.step != self._saved_step:
            # The data ended before the last step.
            trainer.save_checkpoint()
        try:
            trainer.finish_saving()
        except CheckpointError:
            self._report(trainer, continues=False)
            if trainer.is_main_rank:
                logger.warning("step %d: the run ends here, so the failed save is retried once", trainer.state.step)
            trainer.save_checkpoint()
            self._finish_or_fail(trainer)
        self._report(trainer)

    def on_exception(self, trainer: RunningTrainer, error: BaseException) -> None:
        # A second interrupt must not wait, and a CheckpointError was reported by the save that failed.
        if isinstance(error, KeyboardInterrupt | CheckpointError):
            return
        try:
            trainer.drain_saves(DRAIN_SECONDS)
            self._report(trainer, continues=False)
        except Exception:
            logger.warning("waiting for the save in the background failed", exc_info=True)

    def _snapshot_is_due(self, step: int) -> bool:
        return self.snapshot_every is not None and step % self.snapshot_every == 0

    def _save(self, trainer: RunningTrainer, *, continues: bool) -> None:
        trainer.save_checkpoint()
        self._saved_step = trainer.state.step
        self._report(trainer, continues=continues)

    def _finish_or_fail(self, trainer: RunningTrainer) -> None:
        try:
            trainer.finish_saving()
        except CheckpointError as error:
            self._report(trainer, continues=False)
            raise CheckpointError(f"the run ended at step {trainer.state.step}, but {error}") from error

    def _report(self, trainer: RunningTrainer, *, continues: bool = True) -> None:
        for result in trainer.poll_saves():
            self._log(result, "; the run continues" if continues else "")

    def _log(self, result: SaveResult, consequence: str) -> None:
        what = "snapshot" if result.snapshot else "checkpoint"
        if result.error is None:
            self._newest, self._num_failures = str(result.path), 0
            logger.info(
                "step %d: saved %s %s (stalled %.3f s, written in %.3f s)",
                result.step,
                what,
                result.path,
                result.seconds_stalled,
                result.seconds_written,
            )
            if result.notice is not None:
                logger.error("step %d: %s", result.step, result.notice)
            return
        self._num_failures += 1
        logger.error(
            "step %d: the %s could not be saved%s: %s; %s%s",
            result.step,
            what,
            f" ({self._num_failures} failures in a row)" if self._num_failures > 1 else "",
            result.error,
            f"the newest complete one is {self._newest}" if self._newest else "this run has no complete one yet",
            consequence,
        )
