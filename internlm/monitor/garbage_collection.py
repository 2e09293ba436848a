"""Python's garbage collector at chosen steps.

Left alone it runs whenever enough objects were made, on each rank at another moment, and every rank then waits for the
slowest one in the next collective.
"""

from __future__ import annotations

import gc

from internlm.core.hooks import Hook, RunningTrainer
from internlm.core.metrics import StepMetrics


class GarbageCollectionHook(Hook):
    """Collects every `every` steps, on all ranks at the same one, and not in between; with 0 it leaves Python's alone.

    The collector is as it was before, on or off, when the loop is left, also by an exception.
    """

    name = "garbage_collection"

    def __init__(self, every: int) -> None:
        self.every = every
        self._was_enabled = False

    def on_fit_start(self, trainer: RunningTrainer) -> None:
        if self.every > 0:
            self._was_enabled = gc.isenabled()
            gc.collect()
            gc.disable()

    def on_step_end(self, trainer: RunningTrainer, metrics: StepMetrics) -> None:
        if self.every > 0 and trainer.state.step % self.every == 0:
            gc.collect()

    def on_exception(self, trainer: RunningTrainer, error: BaseException) -> None:
        self._restore()

    def on_fit_end(self, trainer: RunningTrainer) -> None:
        self._restore()

    def _restore(self) -> None:
        if self._was_enabled:
            gc.enable()
            self._was_enabled = False
