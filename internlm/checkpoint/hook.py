"""When to save. What a checkpoint is belongs to `internlm.checkpoint.manager`."""

from __future__ import annotations

from internlm.core.hooks import Hook, RunningTrainer
from internlm.utils.logging import get_logger

logger = get_logger(__name__)


class CheckpointHook(Hook):
    """Saves every `every` steps, and at the end of the loop (also on a stop request) a step not saved yet."""

    name = "checkpoint"

    def __init__(self, every: int) -> None:
        self.every = every
        self._saved_step = -1

    def on_fit_start(self, trainer: RunningTrainer) -> None:
        # What was just loaded, or an untrained model, need not be saved.
        self._saved_step = trainer.state.step

    def on_step_counted(self, trainer: RunningTrainer) -> None:
        if trainer.state.step % self.every == 0:
            self._save(trainer)

    def on_fit_end(self, trainer: RunningTrainer) -> None:
        if trainer.state.step != self._saved_step:
            self._save(trainer)

    def _save(self, trainer: RunningTrainer) -> None:
        path = trainer.save_checkpoint()
        self._saved_step = trainer.state.step
        logger.info("step %d: saved checkpoint %s", trainer.state.step, path)
