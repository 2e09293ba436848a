"""Garbage collection at chosen steps, with a log line of the memory in use.

By default, Python's collector runs after a number of allocations, at a different moment on each rank, while all other
ranks wait in their next collective.
"""

from __future__ import annotations

import gc
import resource
import sys

import torch

from internlm.core.hooks import Hook, RunningTrainer
from internlm.utils.logging import get_logger

logger = get_logger(__name__)


def describe_memory() -> str:
    """Peak host memory of this process and, on a GPU, allocated and peak device memory, in GB."""
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    text = f"host memory, peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB"
    if torch.cuda.is_available():
        allocated, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        text += f"; device memory {allocated / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB"
    return text


class GarbageCollectionHook(Hook):
    """Runs Python's garbage collector every `every` steps, on all ranks at the same step, and disables it in between.

    At the same steps PyTorch's cache releases unused blocks to the device, and the memory in use is logged. When the
    loop ends, also by an exception, the collector is enabled again if it was before.

    Args:
        every: steps between two collections; 0 does not change Python's collector.
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

    def on_step_counted(self, trainer: RunningTrainer) -> None:
        if self.every > 0 and trainer.state.step % self.every == 0:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            logger.info("step %d: %s", trainer.state.step, describe_memory())

    def on_exception(self, trainer: RunningTrainer, error: BaseException) -> None:
        self._restore()

    def on_fit_end(self, trainer: RunningTrainer) -> None:
        self._restore()

    def _restore(self) -> None:
        if self._was_enabled:
            gc.enable()
            self._was_enabled = False
