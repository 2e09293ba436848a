"""Brings the micro batches of a step to the device before their passes begin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor

from internlm.data.batch import MicroBatch
from internlm.utils.copy_stream import QueuedCopy, copy_stream_of


@dataclass(frozen=True)
class Upload:
    """A micro batch on its way to the device.

    Attributes:
        copy: results in the micro batch on the device.
    """

    copy: QueuedCopy[MicroBatch]

    def get(self) -> MicroBatch:
        """The micro batch, for work queued from now on on the current stream; the host does not wait."""
        micro_batch = self.copy.wait()
        tensors = [getattr(micro_batch, field.name) for field in fields(MicroBatch)]
        for tensor in (*tensors, *micro_batch.extra.values()):
            if isinstance(tensor, Tensor) and tensor.is_cuda:
                # Allocated on the copy stream, which must not reuse the memory while the current stream reads it.
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return micro_batch


class Uploader:
    """Copies micro batches to one device.

    On CUDA the copies run on a copy stream: from pinned memory they do not wait for what is left of the step before,
    nor does the host wait for them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = copy_stream_of(device)

    def start(self, micro_batches: Sequence[MicroBatch]) -> list[Upload]:
        """Queue the copies of all of them, in order."""
        return [Upload(self._stream.run(partial(micro_batch.to, self._device))) for micro_batch in micro_batches]
