"""All numbers of a step in one flat mapping, under the names that console, metrics file and TensorBoard show.

Owns the one wait for the device per step, which all sinks share. Knows no sink. A sink that can wait one step reads the
numbers through `DeferredMetrics`, which does not stall the device.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from internlm.core.step_metrics import StepMetrics
from internlm.monitor.throughput import Throughput, per_second


@dataclass
class _CountedStep:
    """A step with the rates at its end, and its numbers once they were read.

    Attributes:
        metrics: identifies the step.
        progress: of the sources of data, at its end.
        rates: `Throughput.rates` while it was the last step.
        seconds: its wall time.
        numbers: the result of `MetricsCollector.numbers`.
    """

    metrics: StepMetrics
    progress: dict[str, float]
    rates: dict[str, float | str] | None = None
    seconds: float = math.nan
    numbers: dict[str, float | str] | None = None


class MetricsCollector:
    """Merges `StepMetrics` and `Throughput` into one flat mapping, once per step for all sinks.

    A sink that does not show a step calls `count`, which costs nothing, so that the throughput includes every step.

    The trainer's clock stops when the work of a step is queued, which a GPU may not have finished. A wait for numbers
    is therefore added to the time of the last step counted. That is exact if every step is waited for, and correct on
    average otherwise.

    Args:
        throughput: counts the steps; by default for one rank and without FLOPs.
        clock: returns seconds since any origin.
        progress_at: samples consumed -> further numbers, such as those of the sources of a blend; called in ascending
            order. None: there are none.
    """

    def __init__(
        self,
        throughput: Throughput | None = None,
        clock: Callable[[], float] = time.perf_counter,
        progress_at: Callable[[int], dict[str, float]] | None = None,
    ) -> None:
        self.throughput = throughput or Throughput()
        self._clock = clock
        self._progress_at = progress_at
        self._steps: deque[_CountedStep] = deque(maxlen=2)

    def count(self, metrics: StepMetrics) -> None:
        """Add a step to the throughput without waiting for the device. A second call for the same step does nothing."""
        if self._steps and metrics is self._steps[-1].metrics:
            return
        if self._steps:
            self._store_rates(self._steps[-1])
        progress = {} if self._progress_at is None else self._progress_at(metrics.num_consumed_samples)
        self._steps.append(_CountedStep(metrics, progress))
        self.throughput.add(metrics.num_tokens, metrics.seconds.get("total", math.nan), metrics.num_pictures)

    def numbers(self, metrics: StepMetrics) -> dict[str, float | str]:
        """All numbers of the last step or the one before. The first call for a step waits for the device.

        Returns:
            The numbers of `StepMetrics.numbers` (the phase "forward_backward" as "fwd_bwd_time"), the rates of
            `Throughput.rates`, and `real_tgs`, the tokens per second and rank that contribute loss. Loss and accuracy
            of a data type without tokens in the global batch are left out, and all of them if no token has a label.
        """
        step = next((step for step in self._steps if step.metrics is metrics), None)
        if step is None:
            self.count(metrics)
            step = self._steps[-1]
        if step.numbers is None:
            before = self._clock()
            numbers: dict[str, float | str] = {**metrics.numbers(), **step.progress}
            self.throughput.extend(self._clock() - before)
            self._store_rates(step)
            step.numbers = self._complete(numbers, step)
        return dict(step.numbers)

    def _store_rates(self, step: _CountedStep) -> None:
        if step.rates is None:
            step.rates, step.seconds = self.throughput.rates(), self.throughput.last_seconds

    def _complete(self, numbers: dict[str, float | str], step: _CountedStep) -> dict[str, float | str]:
        numbers["total_time"] = step.seconds
        if "forward_backward_time" in numbers:
            numbers["fwd_bwd_time"] = numbers.pop("forward_backward_time")
        if numbers["valid_tokens"] == 0:
            for name in ("loss", "acc", "perplexity", "loss_from_metric"):
                numbers.pop(name, None)
        for name in [name for name in numbers if name.startswith("tokens/") and numbers[name] == 0]:
            data_type = name.removeprefix("tokens/")
            numbers.pop(f"loss/{data_type}", None)
            numbers.pop(f"acc/{data_type}", None)
        valid_tokens = float(numbers["valid_tokens"]) / self.throughput.world_size
        numbers["real_tgs"] = per_second(valid_tokens, step.seconds)
        assert step.rates is not None
        numbers.update(step.rates)
        return numbers
