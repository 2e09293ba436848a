"""Loss scaling: a factor on the loss that keeps half-precision gradients from underflowing.

Owns the scale and the rule that adjusts it. All state is on the device: whether a step overflowed is a tensor, never a
Python bool, so that no step waits. The optimizer unscales gradients and skips updates.
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
        """Adjust the scale after a step.

        Args:
            found_inf: scalar fp32 tensor on the scaler's device; 1.0 if the gradients contain an inf or NaN, else 0.0;
                equal on all ranks.
        """

    def state_dict(self) -> dict[str, float]:
        """The state as plain numbers; waits for the device."""

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore the state that `state_dict` returned."""


class ConstantGradScaler:
    """A constant scale of 1, for bf16 and fp32, whose exponent range is wide enough."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.scale = torch.ones((), dtype=torch.float32, device=device)

    def update(self, found_inf: Tensor) -> None:
        """Does nothing."""

    def state_dict(self) -> dict[str, float]:
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Ignores the state, which a dynamic scaler may have saved."""


class DynamicGradScaler:
    """A scale that grows after consecutive steps without overflow and backs off after overflows, for fp16.

    - After `growth_interval` consecutive steps without overflow, the scale is multiplied by `growth_factor` (up to
      `max_scale`) and the overflow count is reset.
    - From the `hysteresis`-th overflow since the last growth on, each overflow multiplies the scale by
      `backoff_factor` (down to `min_scale`).

    Raises:
        ConfigError: lists every invalid value.
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
        problems = []
        if not (0 < min_scale <= initial_scale <= max_scale and math.isfinite(max_scale)):
            problems.append(
                f"grad_scaler: needs 0 < min_scale <= initial_scale <= max_scale, "
                f"got {min_scale}, {initial_scale}, {max_scale}"
            )
        if not growth_factor >= 1:
            problems.append(f"grad_scaler.growth_factor = {growth_factor}: must be at least 1")
        if not 0 < backoff_factor <= 1:
            problems.append(f"grad_scaler.backoff_factor = {backoff_factor}: must be above 0 and at most 1")
        if growth_interval < 1:
            problems.append(f"grad_scaler.fp16.growth_interval = {growth_interval}: must be at least 1")
        if hysteresis < 0:
            problems.append(f"grad_scaler.hysteresis = {hysteresis}: must be at least 0")
        if problems:
            raise ConfigError(problems)
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
        """Restore the state that `state_dict` returned; an empty one (of a run without loss scaling) changes nothing.

        Raises:
            CheckpointError: a value is missing.
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
