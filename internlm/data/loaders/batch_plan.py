"""How many micro-batches a step has: ramp-up of the batch size, and skipped steps.

Owns the arithmetic of step numbers; must not know data.
"""

from __future__ import annotations

from dataclasses import dataclass

from internlm.utils.errors import ConfigError


@dataclass(frozen=True)
class RampUp:
    """micro_num as a pure function of the step, counted from 0.

    micro_num(t) = min(start + increment * floor(t / steps), micro_num): it starts at `start` and grows by `increment`
    every `steps` steps up to the configured micro_num.
    """

    micro_num: int
    start: int
    increment: int
    steps: int

    @classmethod
    def parse(cls, text: str, micro_num: int) -> RampUp:
        """Parse data.rampup_batch_size, "start increment steps"; an empty text means no ramp-up.

        Raises:
            ConfigError: not three integers of at least 1, or start is above micro_num.
        """
        if not text.strip():
            return cls(micro_num, micro_num, 1, 1)
        key = f"data.rampup_batch_size = '{text}'"
        try:
            start, increment, steps = map(int, text.split())
        except ValueError:
            raise ConfigError(f"{key}: expected three integers 'start increment steps', such as '1 1 100'") from None
        if min(start, increment, steps) < 1:
            raise ConfigError(f"{key}: start, increment and steps must be at least 1")
        if start > micro_num:
            raise ConfigError(f"{key}: start {start} is above data.micro_num = {micro_num}")
        return cls(micro_num, start, increment, steps)

    def micro_num_at(self, step: int) -> int:
        """Micro-batches of step `step` on each data rank."""
        return min(self.start + self.increment * (step // self.steps), self.micro_num)


@dataclass(frozen=True)
class SkipBatches:
    """Steps whose batch is neither read nor trained on, as inclusive ranges counted from 0."""

    ranges: tuple[tuple[int, int], ...] = ()

    def contains(self, step: int) -> bool:
        """Whether the batch of `step` is skipped."""
        return any(first <= step <= last for first, last in self.ranges)


NO_SKIPS = SkipBatches()


def parse_skip_batches(text: str) -> SkipBatches:
    """Parse data.skip_batches, such as "2-5,7": steps and inclusive ranges; an empty text skips nothing.

    Raises:
        ConfigError: a part is neither a step nor an ascending range.
    """
    ranges = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        first, dash, last = part.partition("-")
        try:
            bounds = (int(first), int(last) if dash else int(first))
        except ValueError:
            bounds = (1, 0)
        if bounds[0] > bounds[1]:
            raise ConfigError(
                f"data.skip_batches = '{text}': '{part}' is neither a step nor a range first-last; example: '2-5,7'"
            )
        ranges.append(bounds)
    return SkipBatches(tuple(ranges))
