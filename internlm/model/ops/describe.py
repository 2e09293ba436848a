"""All ops and what each uses on a device, for the training log."""

from __future__ import annotations

import torch

from internlm.model.ops import attention, cross_entropy, gated, norm, rotary  # noqa: F401  each registers its ops
from internlm.model.ops.registry import Choice, choice_of, registered_ops


def describe(device: torch.device | str) -> dict[str, Choice]:
    """Op name -> `Choice` for every op, on `device`."""
    return {name: choice_of(name, torch.device(device)) for name in registered_ops()}
