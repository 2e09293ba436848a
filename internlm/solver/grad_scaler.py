"""The factor by which the loss is multiplied so that half-precision gradients do not underflow.

Owns the scale and the rule by which it moves. Everything stays on the device: whether a step overflowed is a tensor
here, never a Python bool, so that no step waits. Unscaling and skipping an update are the optimizer's business.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from internlm.utils.errors import CheckpointError, ConfigError


class GradScaler(Protocol):
    """What the engine needs of a scaler."""

    @property
    def scale(self) -> Tensor:
        """Scalar fp32 tensor: the factor of the loss in the coming step."""

    def update(self, found_inf: Tensor) -> None:
        """Learn whether the gradients of a step held an inf or NaN.

        Args:
            found_inf: scalar fp32 tensor on the scaler's device, 1.0 for yes and 0.0 for no, equal on all ranks.
        """

    def state_dict(self) -> dict[str, float]:
        """The state as plain numbers; waits for the device."""

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Takes back what `state_dict` gave."""


class ConstantGradScaler:
    """A scale of 1 that never moves: for bf16 and fp32, whose exponent range is wide enough."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.scale = torch.ones((), dtype=torch.float32, device=device)

    def update(self, found_inf: Tensor) -> None:
        """Nothing moves."""

    def state_dict(self) -> dict[str, float]:
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """There is no state: what a dynamic scaler saved is not needed."""


class DynamicGradScaler:
    """The scale rises after a run of clean steps and falls after overflows: for fp16.

    - A clean step counts towards `growth_interval`; when that many came in a row, the scale is multiplied by
      `growth_factor` (at most `max_scale`), and the count of overflows starts anew.
    - An overflow ends the row. From the `hysteresis`-th overflow since the last growth on, each one multiplies the
      scale by `backoff_factor` (at least `min_scale`).

    Raises:
        ConfigError: listing every value that makes no sense.
    """

    def __init__(
        self,
        initial_scale: float = 2.0**16,
        min_scale: float = 1.0,
        max_scale: float = 2.0**24,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 1000,
        hysteresis: int = 2,
        device: torch.device | str = "cpu",
    ) -> None:
        mistakes = []
        if not (0 < min_scale <= initial_scale <= max_scale and math.isfinite(max_scale)):
            mistakes.append(
                f"grad_scaler: needs 0 < min_scale <= initial_scale <= max_scale, "
                f"got {min_scale}, {initial_scale}, {max_scale}"
            )
        if not growth_factor >= 1:
            mistakes.append(f"grad_scaler.growth_factor = {growth_factor}: must be at least 1")
        if not 0 < backoff_factor <= 1:
            mistakes.append(f"grad_scaler.backoff_factor = {backoff_factor}: must be above 0 and at most 1")
        if growth_interval < 1:
            mistakes.append(f"grad_scaler.fp16.growth_interval = {growth_interval}: must be at least 1")
        if hysteresis < 0:
            mistakes.append(f"grad_scaler.hysteresis = {hysteresis}: must be at least 0")
        if mistakes:
            raise ConfigError(mistakes)
        self.min_scale = min_scale
        self.max_scale = max_scale
        self.growth_factor = growth_factor
        self.backoff_factor = backoff_factor
        self.growth_interval = growth_interval
        self.hysteresis = hysteresis
        self.scale = torch.tensor(initial_scale, dtype=torch.float32, device=device)
        self._clean_steps = torch.zeros((), dtype=torch.int64, device=device)
        self._overflows = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, found_inf: Tensor) -> None:
        overflow = found_inf.reshape(()) > 0
        clean_steps = torch.where(overflow, 0, self._clean_steps + 1)
        overflows = torch.where(overflow, self._overflows + 1, self._overflows)
        grow = clean_steps >= self.growth_interval
        back_off = overflow & (overflows >= self.hysteresis)
        scale = torch.where(grow, (self.scale * self.growth_factor).clamp(max=self.max_scale), self.scale)
        scale = torch.where(back_off, (scale * self.backoff_factor).clamp(min=self.min_scale), scale)
        # New tensors instead of writes in place: the loss of a step still in flight may refer to the old scale.
        self.scale = scale
        self._clean_steps = torch.where(grow, 0, clean_steps)
        self._overflows = torch.where(grow, 0, overflows)

    def state_dict(self) -> dict[str, float]:
        return {
            "scale": self.scale.item(),
            "clean_steps": self._clean_steps.item(),
            "overflows": self._overflows.item(),
        }

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Takes back what `state_dict` gave; an empty state (saved by a run without loss scaling) changes nothing.

        Raises:
            CheckpointError: when a number is missing.
        """
        if not state:
            return
        missing = {"scale", "clean_steps", "overflows"} - state.keys()
        if missing:
            raise CheckpointError(f"the checkpoint's gradient scaler state lacks {', '.join(sorted(missing))}")
        device = self.scale.device
        self.scale = torch.tensor(state["scale"], dtype=torch.float32, device=device)
        self._clean_steps = torch.tensor(int(state["clean_steps"]), dtype=torch.int64, device=device)
        self._overflows = torch.tensor(int(state["overflows"]), dtype=torch.int64, device=device)
