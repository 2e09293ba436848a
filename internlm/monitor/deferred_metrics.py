"""The numbers of a step, copied to the host while the next step is queued."""

from __future__ import annotations

import time

from internlm.core.step_metrics import StepMetrics
from internlm.monitor.metrics_collector import MetricsCollector

SECONDS_AFTER_AN_EXCEPTION = 2.0
"""How long to wait for numbers after an exception, as the step that computes them may never end."""


class DeferredMetrics:
    """Holds at most one step whose numbers are being copied to the host.

    Args:
        collector: shared with the other sinks.
    """

    def __init__(self, collector: MetricsCollector) -> None:
        self.collector = collector
        self._metrics: StepMetrics | None = None

    def defer(self, metrics: StepMetrics) -> None:
        """Count a step and start to copy its numbers. The previous step must have been popped."""
        assert self._metrics is None
        self.collector.count(metrics)
        metrics.start_copy()
        self._metrics = metrics

    @property
    def has_arrived(self) -> bool:
        """Whether `pop_numbers` would return without waiting."""
        return self._metrics is None or self._metrics.has_arrived

    def pop_numbers(self) -> dict[str, float | str] | None:
        """Remove the deferred step and return its numbers, waiting for the copy; None without such a step."""
        if self._metrics is None:
            return None
        metrics, self._metrics = self._metrics, None
        return self.collector.numbers(metrics)

    def discard_unless_arrived(self, seconds: float) -> None:
        """Wait at most `seconds` for the copy, and discard the step if it has not finished.

        For use after an exception, when the device may have failed or may be waiting for other ranks.
        """
        end = time.monotonic() + seconds
        try:
            while not self.has_arrived:
                if time.monotonic() >= end:
                    self._metrics = None
                else:
                    time.sleep(0.01)
        except RuntimeError:
            self._metrics = None
