"""A tensor that communication may still be writing: what everything that runs in the background returns."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch import Tensor

NO_TIMEOUT = timedelta(0)
"""torch's value for "no limit but that of the process group"."""


class Pending:
    """A tensor, and the operation that completes it.

    Args:
        tensor: complete after `wait`.
        work: writes the tensor, or reads it when it is sent; None where nothing is left to do.
    """

    def __init__(self, tensor: Tensor, work: dist.Work | Pending | None = None) -> None:
        self._tensor = tensor
        self._work = work

    def wait(self, timeout: timedelta = NO_TIMEOUT) -> Tensor:
        """Block until the tensor may be used, and return it. On CUDA: order the current stream behind the operation.

        Raises:
            RuntimeError: the operation failed, or took longer than the timeout.
        """
        if self._work is not None:
            self._work.wait(timeout)
        return self._tensor

    def is_completed(self) -> bool:
        """Whether the operation has ended."""
        return self._work is None or self._work.is_completed()
