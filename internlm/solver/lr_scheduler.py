"""The learning rate as a pure function of the step.

Owns the shapes and their exact definition. Keeps no state, so there is nothing to save with a checkpoint, and knows
nothing of optimizers: the engine asks for a number and sets it.
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
"""Shape name -> height above `eta_min` as a fraction of `base_lr - eta_min`, for progress 0..1 of the decay."""


def steps_of_ratio(total_steps: int, ratio: float) -> int:
    """`ratio * total_steps` rounded down; 0.29 * 100 is 29 here, not the 28.999999999999996 of floating point."""
    return math.floor(total_steps * ratio + 1e-6)


@dataclass(frozen=True)
class LearningRateSchedule:
    """Zeros, linear warm-up, then a decay.

    With I = init_steps, W = warmup_ratio * total_steps (rounded down) and t = 0 for the first optimizer step:

    - t < I: the learning rate is 0;
    - I <= t < I + W: `base_lr * (t - I + 1) / W`, so the first warm-up step learns and the last has base_lr;
    - t >= I + W: `eta_min + (base_lr - eta_min) * decay(progress)`, where progress rises by equal amounts from 0 at
      t = begin to 1 at t = total_steps and stays there. `begin` is I + W, for "wsd" it is total_steps - D, with
      D = decay_ratio * total_steps (rounded down), and the rate is base_lr from the warm-up to there.

    `decay` is half a cosine ("cosine"), a line ("linear", "wsd") or 1 ("constant", which does not use `eta_min`).

    Attributes:
        shape: "cosine", "wsd" (warm-up, stable, decay), "linear" or "constant".
        base_lr: the learning rate at the end of the warm-up.
        total_steps: optimizer steps over which the schedule runs.
        init_steps: steps at learning rate 0 before the warm-up.
        warmup_ratio: length of the warm-up as a fraction of `total_steps`.
        eta_min: the learning rate at which the decay ends; above base_lr, the rate grows to it.
        decay_ratio: length of the decay of "wsd" as a fraction of `total_steps`.
        last_epoch: steps of the schedule already used up, minus one: -1 starts at its beginning.

    Raises:
        ConfigError: listing every value that makes no sense.
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
        mistakes = []
        if self.shape not in DECAYS:
            mistakes.append(
                f"lr_scheduler.type = '{self.shape}' is unknown; use one of {', '.join(DECAYS)}."
                f"{nearest(self.shape, DECAYS)}"
            )
        if not (self.base_lr >= 0 and math.isfinite(self.base_lr)):
            mistakes.append(f"adam.lr = {self.base_lr}: must be a finite number >= 0")
        if self.total_steps < 1:
            mistakes.append(f"lr_scheduler.total_steps = {self.total_steps}: must be at least 1")
        if self.init_steps < 0:
            mistakes.append(f"lr_scheduler.init_steps = {self.init_steps}: must be at least 0")
        if self.last_epoch < -1:
            mistakes.append(f"lr_scheduler.last_epoch = {self.last_epoch}: must be -1 (from the start) or more")
        for name, ratio in (("warmup_ratio", self.warmup_ratio), ("decay_ratio", self.decay_ratio)):
            if not 0.0 <= ratio <= 1.0:
                mistakes.append(f"lr_scheduler.{name} = {ratio}: must be between 0 and 1, a fraction of total_steps")
        if not (self.eta_min >= 0 and math.isfinite(self.eta_min)):
            mistakes.append(f"lr_scheduler.eta_min = {self.eta_min}: must be a finite number >= 0")
        if not mistakes:
            decay_steps = self.total_steps - self._decay_begin if self.shape == "wsd" else 0
            used = self.init_steps + self.warmup_steps + decay_steps
            if used > self.total_steps:
                mistakes.append(
                    f"lr_scheduler: init_steps ({self.init_steps}) + warm-up ({self.warmup_steps}) + decay "
                    f"({decay_steps}) = {used} steps do not fit in total_steps = {self.total_steps}; "
                    "make init_steps, warmup_ratio or decay_ratio smaller"
                )
        if mistakes:
            raise ConfigError(mistakes)

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
