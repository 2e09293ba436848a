"""The numbers of a step as everything that shows or stores them names them.

Owns the throughput (tokens per second, FLOP/s, MFU) and the one wait for the device a step: all sinks (console, file,
TensorBoard) share one `StepNumbers`. Knows nothing of where the numbers go. A sink that is in no hurry has its numbers
from a `HeldStep`, a step later and without holding up the device.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from internlm.core.step_metrics import StepMetrics
from internlm.estimate.flops import Convention

AVERAGE_WINDOW = 50
"""Steps of the simple moving average and of the longest sliding window."""

SECONDS_AFTER_AN_EXCEPTION = 2.0
"""How long numbers are waited for when the run has failed; the step that they are of may never end."""


@dataclass(frozen=True)
class FlopsModel:
    """What turns tokens per second into TFLOP/s and MFU.

    Attributes:
        full: FLOPs of a token, forward and backward, with the full square of attention scores.
        causal: the same with half of it.
        peak: FLOP/s of the device's datasheet; None where unknown, and then there is no MFU.
        convention: which of the two `tflops` and `mfu` mean.
    """

    full: float
    causal: float
    peak: float | None = None
    convention: Convention = "causal"


class Throughput:
    """Tokens per second of one rank, from the token counts and wall times that the host knows.

    All of them count padding. They start at zero when a run is resumed: they speak of this process.
    """

    def __init__(self, world_size: int = 1, flops: FlopsModel | None = None) -> None:
        self.world_size = world_size
        self.flops = flops
        self._recent: deque[tuple[float, float]] = deque(maxlen=AVERAGE_WINDOW)
        self._tokens = 0.0
        self._seconds = 0.0
        self._sum_of_rates = 0.0
        self._steps = 0

    def add(self, num_tokens: int, seconds: float) -> None:
        """Count a step: tokens of the whole world (padding included) and its wall time in seconds."""
        tokens = num_tokens / self.world_size
        self._recent.append((tokens, seconds))
        self._tokens += tokens
        self._seconds += seconds
        self._sum_of_rates += _rate(tokens, seconds)
        self._steps += 1

    def extend(self, seconds: float) -> None:
        """The step counted last took this much longer."""
        tokens, before = self._recent.pop()
        after = before + seconds
        self._recent.append((tokens, after))
        self._seconds += seconds
        self._sum_of_rates += _rate(tokens, after) - _rate(tokens, before)

    @property
    def last_seconds(self) -> float:
        """Wall time of the step counted last."""
        return self._recent[-1][1]

    def seconds_per_step(self) -> float:
        """Mean wall time of the last steps (at most `AVERAGE_WINDOW`); NaN before the first one."""
        return sum(seconds for _, seconds in self._recent) / len(self._recent) if self._recent else math.nan

    def numbers(self) -> dict[str, float | str]:
        """Rates after at least one `add`, all per rank.

        tgs, tgs/last_tgs_1: tokens per second of the last step. tgs/last_tgs_10, tgs/last_tgs_50: tokens of the last 10
        or 50 steps over their time. tgs/tgs_SMA: mean of the tgs of the last 50 steps. tgs/tgs_all: all tokens over all
        time. tgs/tgs_avg: mean of the tgs of all steps. tflops and mfu (a fraction) are of the last step, in the
        convention that `mfu_convention` spells out; tflops_<other> and mfu_<other> are the same in the other one.
        """
        rates = [_rate(tokens, seconds) for tokens, seconds in self._recent]
        tgs = rates[-1]
        numbers: dict[str, float | str] = {
            "tgs": tgs,
            "tgs/last_tgs_1": tgs,
            "tgs/last_tgs_10": self._window_rate(10),
            "tgs/last_tgs_50": self._window_rate(AVERAGE_WINDOW),
            "tgs/tgs_SMA": sum(rates) / len(rates),
            "tgs/tgs_all": _rate(self._tokens, self._seconds),
            "tgs/tgs_avg": self._sum_of_rates / self._steps,
        }
        if self.flops is not None:
            numbers.update(self._flops_numbers(tgs, self.flops))
        return numbers

    def _window_rate(self, num_steps: int) -> float:
        window = list(self._recent)[-num_steps:]
        return _rate(sum(tokens for tokens, _ in window), sum(seconds for _, seconds in window))

    @staticmethod
    def _flops_numbers(tgs: float, flops: FlopsModel) -> dict[str, float | str]:
        other: Convention = "full" if flops.convention == "causal" else "causal"
        numbers: dict[str, float | str] = {}
        for suffix, convention in (("", flops.convention), (f"_{other}", other)):
            achieved = tgs * (flops.full if convention == "full" else flops.causal)
            numbers[f"tflops{suffix}"] = achieved / 1e12
            if flops.peak is not None:
                numbers[f"mfu{suffix}"] = achieved / flops.peak
        peak = "no datasheet peak known" if flops.peak is None else f"peak {flops.peak / 1e12:g} TFLOP/s"
        numbers["mfu_convention"] = f"{flops.convention} attention, no recomputation, {peak}"
        return numbers


@dataclass
class _CountedStep:
    """A step, the rates as they were when it was the last one, and its numbers once somebody asked for them."""

    metrics: StepMetrics
    rates: dict[str, float | str] | None = None
    seconds: float = math.nan
    numbers: dict[str, float | str] | None = None


class StepNumbers:
    """`StepMetrics` and `Throughput` as one flat mapping, made once a step however many sinks ask.

    A sink that does not show a step calls `count`, which costs nothing, so that the throughput misses no step.

    The trainer's clock stops when the work of a step is queued; a GPU may still be at it. A wait for numbers is
    therefore added to the time of the step counted last, which is exact where every step is waited for, and on average
    elsewhere.

    Args:
        throughput: counts the steps; without FLOPs and for one rank unless given.
        clock: seconds from any origin.
    """

    def __init__(self, throughput: Throughput | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self.throughput = throughput or Throughput()
        self._clock = clock
        self._steps: deque[_CountedStep] = deque(maxlen=2)

    def count(self, metrics: StepMetrics) -> None:
        """Take note of a step without waiting for the device; a second call for the same step does nothing."""
        if self._steps and metrics is self._steps[-1].metrics:
            return
        if self._steps:
            self._keep_rates(self._steps[-1])
        self._steps.append(_CountedStep(metrics))
        self.throughput.add(metrics.num_tokens, metrics.seconds.get("total", math.nan))

    def of(self, metrics: StepMetrics) -> dict[str, float | str]:
        """All numbers of a step, the last one or the one before; the first call waits for the device.

        Those of `StepMetrics.numbers()` (with "fwd_bwd_time" for the phase "forward_backward") and of
        `Throughput.numbers()`, and real_tgs, the tokens per second and rank that contribute loss. The loss and accuracy
        of a data type of which the global batch had no token are left out, and all of them where no token had a label.
        """
        step = next((step for step in self._steps if step.metrics is metrics), None)
        if step is None:
            self.count(metrics)
            step = self._steps[-1]
        if step.numbers is None:
            before = self._clock()
            numbers: dict[str, float | str] = dict(metrics.numbers())
            self.throughput.extend(self._clock() - before)
            self._keep_rates(step)
            step.numbers = self._complete(numbers, step)
        return dict(step.numbers)

    def _keep_rates(self, step: _CountedStep) -> None:
        if step.rates is None:
            step.rates, step.seconds = self.throughput.numbers(), self.throughput.last_seconds

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
        numbers["real_tgs"] = _rate(float(numbers["valid_tokens"]) / self.throughput.world_size, step.seconds)
        assert step.rates is not None
        numbers.update(step.rates)
        return numbers


class HeldStep:
    """At most one step, whose numbers are on their way to the host while the next step is at work.

    Args:
        numbers: shared with the other sinks.
    """

    def __init__(self, numbers: StepNumbers) -> None:
        self.numbers = numbers
        self._metrics: StepMetrics | None = None

    def hold(self, metrics: StepMetrics) -> None:
        """Count a step and let its numbers come; the one held before must have been taken."""
        assert self._metrics is None
        self.numbers.count(metrics)
        metrics.start_copy()
        self._metrics = metrics

    @property
    def has_arrived(self) -> bool:
        """Whether `take` would not wait."""
        return self._metrics is None or self._metrics.has_arrived

    def take(self) -> dict[str, float | str] | None:
        """The numbers of the step held, which then is no more; None when there is none. Waits for them."""
        if self._metrics is None:
            return None
        metrics, self._metrics = self._metrics, None
        return self.numbers.of(metrics)

    def drop_unless_it_arrives(self, seconds: float) -> None:
        """Wait no longer than that, and forget the step if it has not come: for after an exception, when the device may
        have failed or wait for others."""
        end = time.monotonic() + seconds
        try:
            while not self.has_arrived:
                if time.monotonic() >= end:
                    self._metrics = None
                else:
                    time.sleep(0.01)
        except RuntimeError:
            self._metrics = None


def _rate(tokens: float, seconds: float) -> float:
    return tokens / seconds if seconds > 0 else math.nan
