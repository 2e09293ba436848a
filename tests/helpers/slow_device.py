"""Metrics of a device that takes its time: stands for a GPU where there is none."""

from __future__ import annotations

from typing import Any

from helpers.fake_trainer import step_metrics
from internlm.core.step_metrics import StepMetrics


class SlowDevice:
    """Steps whose values come when the host waits for them, or when told.

    Attributes:
        waited: the steps that the host has waited for, in order.
        fails: the device has failed.
    """

    def __init__(self) -> None:
        self.arrived: set[int] = set()
        self.waited: list[int] = []
        self.fails = False

    def metrics(self, step: int, **fields: Any) -> StepMetrics:
        """A step whose values are on their way."""
        metrics = step_metrics(step, **fields)
        metrics._arrival = _Arrival(self, step)  # type: ignore[assignment]
        return metrics


class _Arrival:
    """What is used of a `torch.cuda.Event`."""

    def __init__(self, device: SlowDevice, step: int) -> None:
        self.device, self.step = device, step

    def query(self) -> bool:
        if self.device.fails:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return self.step in self.device.arrived

    def synchronize(self) -> None:
        if self.step not in self.device.arrived:
            self.device.waited.append(self.step)
            self.device.arrived.add(self.step)
