"""A copy stream at its slowest, to find a missing wait without a device."""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from internlm.utils.copy_stream import CopyStream, QueuedCopy

T = TypeVar("T")


def nonsense(dtype: torch.dtype) -> float:
    return math.nan if dtype.is_floating_point else 77


class LateCopyStream(CopyStream):
    """Copies nothing until something waits, then in order and no further than that.

    New host buffers, and targets of `copy` on the device until they are waited for, hold nonsense; so does what `copy`
    made of a source that was freed in the meantime.

    Attributes:
        buffers: the host buffers made so far.
    """

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []
        self._queue: deque[Callable[[], object]] = deque()
        self._num_queued = self._num_done = 0
        self._follows = False

    def new_host_buffer(self, numel: int, dtype: torch.dtype) -> Tensor:
        self.buffers.append(super().new_host_buffer(numel, dtype).fill_(nonsense(dtype)))
        return self.buffers[-1]

    def wait_for_compute(self) -> None:
        self._follows = True

    def run(self, copy: Callable[[], T]) -> QueuedCopy[T]:
        assert self._follows, "copies would not wait for the computation of what they read"
        results: list[T] = []
        self._queue.append(lambda: results.append(copy()))
        self._num_queued += 1
        return _LateCopy(self, self._num_queued, results)

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> QueuedCopy[None]:
        noted = []
        for target, source in pairs:
            to_host = any(target.data_ptr() == buffer.data_ptr() for buffer in self.buffers)
            if not to_host:
                target.fill_(nonsense(target.dtype))
            noted.append((weakref.ref(target), weakref.ref(source), to_host))

        def copy() -> None:
            for first, second, to_host in noted:
                target, source = first(), second()
                if target is not None:
                    target.fill_(nonsense(target.dtype)) if source is None else target.copy_(source)
                assert target is not None or to_host, "a copy writes to memory of the device that was freed"

        return self.run(copy)

    def join(self) -> None:
        self.finish(self._num_queued)

    def finish(self, number: int) -> None:
        """Make the first `number` copies, if they are not made yet."""
        while self._num_done < number:
            self._num_done += 1
            self._queue.popleft()()


class _LateCopy(QueuedCopy[T]):
    def __init__(self, stream: LateCopyStream, number: int, results: list[T]) -> None:
        self._stream, self._number, self._results = stream, number, results

    def wait(self) -> T:
        self._stream.finish(self._number)
        return self._results[0]

    def synchronize(self) -> T:
        return self.wait()
