"""A tensor that a collective may still be writing: the result of every asynchronous operation."""

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
        work: writes the tensor, or reads it to send it; None if it is complete.
    """

    def __init__(self, tensor: Tensor, work: dist.Work | Pending | None = None) -> None:
        self._tensor = tensor
        self._work = work

    def wait(self, timeout: timedelta = NO_TIMEOUT) -> Tensor:
        """Block until the tensor may be used, and return it. On CUDA, the current stream waits instead of the host.

        Raises:
            RuntimeError: the operation failed, or took longer than the timeout.
        """
        if self._work is not None:
            self._work.wait(timeout)
        return self._tensor

    def is_completed(self) -> bool:
        """Whether the operation has ended."""
        return self._work is None or self._work.is_completed()
