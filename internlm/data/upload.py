"""Copies the micro-batches of a step to the device before their forward passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from internlm.data.batch import MicroBatch
from internlm.utils.copy_stream import QueuedCopy, copy_stream_of


@dataclass(frozen=True)
class Upload:
    """A queued copy of a micro-batch to the device.

    Attributes:
        copy: the copy, whose result is the micro-batch on the device.
    """

    copy: QueuedCopy[MicroBatch]

    def get(self) -> MicroBatch:
        """Make the current stream wait for the copy and return the micro-batch; the host does not wait."""
        return self.copy.wait().copied(_used_by_current_stream)


def _used_by_current_stream(tensor: Tensor) -> Tensor:
    """Keep the copy stream, on which the tensor was allocated, from reusing its memory while this stream reads it."""
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return tensor


class Uploader:
    """Copies micro-batches to one device.

    On CUDA, copies from pinned memory run on a copy stream, at the same time as kernels of the previous step, and the
    host does not wait for them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = copy_stream_of(device)

    def start(self, micro_batches: Sequence[MicroBatch]) -> list[Upload]:
        """Queue a copy of each micro-batch, in order."""
        return [Upload(self._stream.run(partial(micro_batch.to, self._device))) for micro_batch in micro_batches]
