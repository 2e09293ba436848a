"""Copies between device and host memory that overlap with computation.

On CUDA, a `CopyStream` is a CUDA stream. Activation offload, offloaded optimizer states and the upload of batches have
one each. Tests inject a stream that postpones copies until something waits for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class QueuedCopy(Generic[T]):
    """A copy that may still be running; this base class is a finished one.

    Attributes:
        result: what the copying function returned; complete after `wait` or `synchronize`.
    """

    def __init__(self, result: T) -> None:
        self.result = result

    def wait(self) -> T:
        """Order the device's current stream behind the copy; the host does not wait."""
        return self.result

    def synchronize(self) -> T:
        """Block the host until the copy has finished."""
        return self.result


class CopyStream:
    """A queue of copies, executed in order.

    This base class is for devices whose memory is host memory; it copies immediately.
    """

    def new_host_buffer(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Uninitialized host memory, `[numel]`, such that copies from and to it do not block."""
        return torch.empty(numel, dtype=dtype)

    def wait_for_compute(self) -> None:
        """Order later copies behind everything queued on the device's current stream so far."""

    def run(self, copy: Callable[[], T]) -> QueuedCopy[T]:
        """Queue the copies that `copy` makes.

        Their memory must not be freed or overwritten before something has waited for them.
        """
        return QueuedCopy(copy())

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> QueuedCopy[None]:
        """Queue a copy for each pair (target, source); see `run`."""

        def copy() -> None:
            for target, source in pairs:
                target.copy_(source, non_blocking=True)

        return self.run(copy)

    def join(self) -> None:
        """Order the device's current stream behind all queued copies; the host does not wait."""


class CudaCopyStream(CopyStream):
    """A CUDA stream that copies from and to pinned memory.

    Args:
        device: the CUDA device on one side of the copies.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def new_host_buffer(self, numel: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(numel, dtype=dtype, pin_memory=True)

    def wait_for_compute(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def run(self, copy: Callable[[], T]) -> QueuedCopy[T]:
        with torch.cuda.stream(self._stream):
            return _CudaCopy(copy(), self._stream.record_event(), self._device)

    def join(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


class _CudaCopy(QueuedCopy[T]):
    def __init__(self, result: T, event: torch.cuda.Event, device: torch.device) -> None:
        super().__init__(result)
        self._event = event
        self._device = device

    def wait(self) -> T:
        torch.cuda.current_stream(self._device).wait_event(self._event)
        return self.result

    def synchronize(self) -> T:
        self._event.synchronize()
        return self.result


def copy_stream_of(device: torch.device) -> CopyStream:
    """A new copy stream between a device and the host."""
    return CudaCopyStream(device) if device.type == "cuda" else CopyStream()
