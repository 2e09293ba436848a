"""AdamW's beta2 as a pure function of the step; stateless and independent of the optimizer."""

from __future__ import annotations

from dataclasses import dataclass

from internlm.utils.errors import ConfigError
from internlm.utils.former_names import explain_former_names

explain_former_names(__name__)


@dataclass(frozen=True)
class Beta2Schedule:
    """`beta2(t) = max(init_beta2, 1 - t^-c)` with t = 1 at the first optimizer step; constant when c <= 0.

    The rising coefficient is that of Adafactor (Shazeer & Stern 2018, https://arxiv.org/abs/1804.04235, section 7.2).

    Attributes:
        init_beta2: the lowest value, in [0, 1).
        c: the exponent; the larger it is, the earlier beta2 rises above `init_beta2`.
        cur_iter: number of steps to skip at the start of the schedule, minus one; -1 skips none.

    Raises:
        ConfigError: lists every invalid value.
    """

    init_beta2: float
    c: float = 0.0
    cur_iter: int = -1

    def __post_init__(self) -> None:
        problems = []
        if not 0.0 <= self.init_beta2 < 1.0:
            problems.append(f"beta2_scheduler.init_beta2 = {self.init_beta2}: must be at least 0 and below 1")
        if self.cur_iter < -1:
            problems.append(f"beta2_scheduler.cur_iter = {self.cur_iter}: must be -1 (from the start) or more")
        if problems:
            raise ConfigError(problems)

    def beta2(self, step: int) -> float:
        """The coefficient of an optimizer step; `step` is 0 for the first one."""
        if self.c <= 0:
            return self.init_beta2
        t = step + self.cur_iter + 2
        return max(self.init_beta2, 1.0 - t**-self.c)
