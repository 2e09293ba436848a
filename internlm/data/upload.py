"""Brings the micro batches of a step to the device before their passes begin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from internlm.data.batch import MicroBatch


@dataclass(frozen=True)
class Upload:
    """A micro batch on its way.

    Attributes:
        micro_batch: with tensors on the device.
        arrival: recorded behind the copies; None where they are done.
    """

    micro_batch: MicroBatch
    arrival: torch.cuda.Event | None = None

    def get(self) -> MicroBatch:
        """The micro batch, for work queued from now on on the current stream; the host does not wait."""
        if self.arrival is not None:
            stream = torch.cuda.current_stream(self.micro_batch.input_ids.device)
            stream.wait_event(self.arrival)
            for field in fields(MicroBatch):
                tensor = getattr(self.micro_batch, field.name)
                if isinstance(tensor, Tensor):
                    # Its memory belongs to the stream of the copies, and must not be given away while this one reads.
                    tensor.record_stream(stream)
        return self.micro_batch


class Uploader:
    """Copies to one device. On CUDA the copies run on a stream of their own: from pinned memory they need not wait for
    what the device still has to compute of the step before, nor does the host wait for them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, micro_batches: Sequence[MicroBatch]) -> list[Upload]:
        """Queue the copies of all of them, in order."""
        if self._stream is None:
            return [Upload(micro_batch.to(self._device)) for micro_batch in micro_batches]
        uploads = []
        with torch.cuda.stream(self._stream):
            for micro_batch in micro_batches:
                uploads.append(Upload(micro_batch.to(self._device), torch.cuda.Event()))
                self._stream.record_event(uploads[-1].arrival)
        return uploads
