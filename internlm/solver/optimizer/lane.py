"""Copies between device and host that run beside the computation, in the order in which they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from internlm.core.communication.collectives import Done, Work


class Lane(Protocol):
    """A queue of copies."""

    def follow(self) -> None:
        """Let the copies to come wait for what the current stream has been given until now."""

    def run(self, copy: Callable[[], object]) -> Work:
        """Do what `copy` does; the host may rely on it after `wait`."""

    def join(self) -> None:
        """Let the current stream wait for all copies, without the host."""


class StreamLane:
    """A CUDA stream of its own.

    Args:
        device: the one that copies from or to the host.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._device = device

    def follow(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def run(self, copy: Callable[[], object]) -> Work:
        with torch.cuda.stream(self._stream):
            copy()
            return _Recorded(self._stream.record_event())

    def join(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


class _Recorded:
    """A point in a stream."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        self._event.synchronize()


class HostLane:
    """Where the device is the host, copies are done at once."""

    def follow(self) -> None:
        """Nothing is under way."""

    def run(self, copy: Callable[[], object]) -> Work:
        copy()
        return Done()

    def join(self) -> None:
        """Nothing is under way."""


def lane_of(device: torch.device) -> Lane:
    """A new lane between a device and the host."""
    return StreamLane(device) if device.type == "cuda" else HostLane()
