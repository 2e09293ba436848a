"""Throughput of one rank: tokens per second, FLOP/s and MFU over several windows of steps."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from internlm.estimate.flops import Convention

AVERAGE_WINDOW = 50
"""Steps of the simple moving average and of the longest sliding window."""


@dataclass(frozen=True)
class FlopsModel:
    """Converts tokens per second into FLOP/s and MFU.

    Attributes:
        full: FLOPs per token, forward and backward, with the full square of attention scores.
        causal: FLOPs per token with half of that square.
        peak: FLOP/s of the device according to its datasheet; None if unknown, which leaves out the MFU.
        convention: which of the two `tflops` and `mfu` use.
        per_picture: FLOPs of a picture before the decoder, which reads it as tokens.
    """

    full: float
    causal: float
    peak: float | None = None
    convention: Convention = "causal"
    per_picture: float = 0.0


class Throughput:
    """Tokens per second of one rank, padding included, from token counts and wall times on the host.

    Counts start at zero in every process, also when a run resumes.

    Args:
        world_size: number of ranks that share the tokens of a step.
        flops: adds FLOP/s and MFU to the rates; None leaves them out.
    """

    def __init__(self, world_size: int = 1, flops: FlopsModel | None = None) -> None:
        self.world_size = world_size
        self.flops = flops
        self._recent: deque[tuple[float, float]] = deque(maxlen=AVERAGE_WINDOW)
        self._tokens = 0.0
        self._seconds = 0.0
        self._sum_of_rates = 0.0
        self._steps = 0
        self._pictures = 0.0

    def add(self, num_tokens: int, seconds: float, num_pictures: int = 0) -> None:
        """Add a step.

        Args:
            num_tokens: tokens of all ranks, padding included.
            seconds: wall time of the step.
            num_pictures: pictures of all ranks.
        """
        self._pictures = num_pictures / self.world_size
        tokens = num_tokens / self.world_size
        self._recent.append((tokens, seconds))
        self._tokens += tokens
        self._seconds += seconds
        self._sum_of_rates += per_second(tokens, seconds)
        self._steps += 1

    def extend(self, seconds: float) -> None:
        """Add `seconds` to the wall time of the last step."""
        tokens, before = self._recent.pop()
        after = before + seconds
        self._recent.append((tokens, after))
        self._seconds += seconds
        self._sum_of_rates += per_second(tokens, after) - per_second(tokens, before)

    @property
    def last_seconds(self) -> float:
        """Wall time of the last step."""
        return self._recent[-1][1]

    def seconds_per_step(self) -> float:
        """Mean wall time of at most the last `AVERAGE_WINDOW` steps; NaN before the first one."""
        return sum(seconds for _, seconds in self._recent) / len(self._recent) if self._recent else math.nan

    def rates(self) -> dict[str, float | str]:
        """Rates per rank; needs at least one `add`.

        Returns:
            - `tgs`, `tgs/last_tgs_1`: tokens per second of the last step.
            - `tgs/last_tgs_10`, `tgs/last_tgs_50`: tokens of the last 10 or 50 steps divided by their time.
            - `tgs/tgs_SMA`: mean `tgs` of the last 50 steps.
            - `tgs/tgs_all`: all tokens divided by the whole time.
            - `tgs/tgs_avg`: mean `tgs` of all steps.
            - With a `FlopsModel`: `tflops` and `mfu` (a fraction) of the last step in the convention that
              `mfu_convention` describes; `tflops_<other>` and `mfu_<other>` in the other one.
        """
        window = [per_second(tokens, seconds) for tokens, seconds in self._recent]
        tgs = window[-1]
        rates: dict[str, float | str] = {
            "tgs": tgs,
            "tgs/last_tgs_1": tgs,
            "tgs/last_tgs_10": self._window_rate(10),
            "tgs/last_tgs_50": self._window_rate(AVERAGE_WINDOW),
            "tgs/tgs_SMA": sum(window) / len(window),
            "tgs/tgs_all": per_second(self._tokens, self._seconds),
            "tgs/tgs_avg": self._sum_of_rates / self._steps,
        }
        if self.flops is not None:
            pictures = per_second(self._pictures, self.last_seconds)
            rates.update(_flops_rates(tgs, pictures, self.flops))
        return rates

    def _window_rate(self, num_steps: int) -> float:
        window = list(self._recent)[-num_steps:]
        return per_second(sum(tokens for tokens, _ in window), sum(seconds for _, seconds in window))


def per_second(number: float, seconds: float) -> float:
    """The rate of tokens or pictures; NaN unless `seconds` is positive."""
    return number / seconds if seconds > 0 else math.nan


def _flops_rates(tgs: float, pictures: float, flops: FlopsModel) -> dict[str, float | str]:
    other: Convention = "full" if flops.convention == "causal" else "causal"
    rates: dict[str, float | str] = {}
    for suffix, convention in (("", flops.convention), (f"_{other}", other)):
        achieved = tgs * (flops.full if convention == "full" else flops.causal) + pictures * flops.per_picture
        rates[f"tflops{suffix}"] = achieved / 1e12
        if flops.peak is not None:
            rates[f"mfu{suffix}"] = achieved / flops.peak
    peak = "no datasheet peak known" if flops.peak is None else f"peak {flops.peak / 1e12:g} TFLOP/s"
    rates["mfu_convention"] = f"{flops.convention} attention, no recomputation, {peak}"
    return rates
