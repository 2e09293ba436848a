"""The learning rate as a pure function of the step.

Stateless, so checkpoints save nothing of it, and independent of the optimizer, to which the engine passes the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from internlm.utils.errors import ConfigError, nearest
from internlm.utils.former_names import explain_former_names

explain_former_names(__name__)


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _linear(progress: float) -> float:
    return 1.0 - progress


def _constant(progress: float) -> float:
    return 1.0


DECAYS: dict[str, Callable[[float], float]] = {
    "cosine": _cosine,
    "wsd": _linear,
    "linear": _linear,
    "constant": _constant,
}
"""Shape -> function from the progress of the decay (0 to 1) to the height above `eta_min` in units of `base_lr -
eta_min`."""


def steps_of_ratio(total_steps: int, ratio: float) -> int:
    """`ratio * total_steps` rounded down; 0.29 * 100 is 29 here, not the 28.999999999999996 of floating point."""
    return math.floor(total_steps * ratio + 1e-6)


@dataclass(frozen=True)
class LearningRateSchedule:
    """A learning rate of zero, a linear warm-up, then a decay.

    With I = init_steps, W = warmup_ratio * total_steps (rounded down) and t = 0 for the first optimizer step:

    - t < I: the learning rate is 0;
    - I <= t < I + W: `base_lr * (t - I + 1) / W`, so the first warm-up step has a positive rate and the last has
    base_lr;
    - t >= I + W: `eta_min + (base_lr - eta_min) * decay(progress)`, where progress rises linearly from 0 at t = begin
    to 1 at t = total_steps and stays 1. `begin` is I + W; for "wsd" it is total_steps - D with D = decay_ratio *
    total_steps (rounded down), and the rate is base_lr between the warm-up and `begin`.

    `decay` is half a cosine period ("cosine"), linear ("linear", "wsd") or 1 ("constant", which ignores `eta_min`).

    Attributes:
        shape: "cosine", "wsd" (warm-up, stable, decay), "linear" or "constant".
        base_lr: the learning rate at the end of the warm-up.
        total_steps: optimizer steps over which the schedule runs.
        init_steps: steps at learning rate 0 before the warm-up.
        warmup_ratio: length of the warm-up as a fraction of `total_steps`.
        eta_min: the learning rate at the end of the decay; if above base_lr, the rate rises to it.
        decay_ratio: length of the decay of "wsd" as a fraction of `total_steps`.
        last_epoch: number of steps to skip at the start of the schedule, minus one; -1 skips none.

    Raises:
        ConfigError: lists every invalid value.
    """

    shape: str
    base_lr: float
    total_steps: int
    init_steps: int = 0
    warmup_ratio: float = 0.0
    eta_min: float = 0.0
    decay_ratio: float = 0.1
    last_epoch: int = -1

    def __post_init__(self) -> None:
        problems = []
        if self.shape not in DECAYS:
            problems.append(
                f"lr_scheduler.type = '{self.shape}' is unknown; use one of {', '.join(DECAYS)}."
                f"{nearest(self.shape, DECAYS)}"
            )
        if not (self.base_lr >= 0 and math.isfinite(self.base_lr)):
            problems.append(f"adam.lr = {self.base_lr}: must be a finite number >= 0")
        if self.total_steps < 1:
            problems.append(f"lr_scheduler.total_steps = {self.total_steps}: must be at least 1")
        if self.init_steps < 0:
            problems.append(f"lr_scheduler.init_steps = {self.init_steps}: must be at least 0")
        if self.last_epoch < -1:
            problems.append(f"lr_scheduler.last_epoch = {self.last_epoch}: must be -1 (from the start) or more")
        for name, ratio in (("warmup_ratio", self.warmup_ratio), ("decay_ratio", self.decay_ratio)):
            if not 0.0 <= ratio <= 1.0:
                problems.append(f"lr_scheduler.{name} = {ratio}: must be between 0 and 1, a fraction of total_steps")
        if not (self.eta_min >= 0 and math.isfinite(self.eta_min)):
            problems.append(f"lr_scheduler.eta_min = {self.eta_min}: must be a finite number >= 0")
        if not problems:
            decay_steps = self.total_steps - self._decay_begin if self.shape == "wsd" else 0
            used = self.init_steps + self.warmup_steps + decay_steps
            if used > self.total_steps:
                problems.append(
                    f"lr_scheduler: init_steps ({self.init_steps}) + warm-up ({self.warmup_steps}) + decay "
                    f"({decay_steps}) = {used} steps do not fit in total_steps = {self.total_steps}; "
                    "reduce init_steps, warmup_ratio or decay_ratio"
                )
        if problems:
            raise ConfigError(problems)

    @property
    def warmup_steps(self) -> int:
        """Steps of the linear warm-up."""
        return steps_of_ratio(self.total_steps, self.warmup_ratio)

    @property
    def _decay_begin(self) -> int:
        if self.shape == "wsd":
            return self.total_steps - steps_of_ratio(self.total_steps, self.decay_ratio)
        return self.init_steps + self.warmup_steps

    def lr(self, step: int) -> float:
        """The learning rate of an optimizer step; `step` is 0 for the first one."""
        position = step + self.last_epoch + 1
        in_warmup = position - self.init_steps
        if in_warmup < 0:
            return 0.0
        if in_warmup < self.warmup_steps:
            return self.base_lr * (in_warmup + 1) / self.warmup_steps
        begin = self._decay_begin
        if position < begin or self.shape == "constant":
            return self.base_lr
        progress = min(1.0, (position - begin) / max(1, self.total_steps - begin))
        return self.eta_min + (self.base_lr - self.eta_min) * DECAYS[self.shape](progress)
