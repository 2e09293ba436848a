"""Which implementation of an op runs on which device, and why.

Each op module decides once, from what is installed and what the device can do, and records that decision here. Nothing
falls back silently: `ops.describe` is what the training log prints.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class Choice(NamedTuple):
    """The implementation that an op uses, and the reason for it."""

    implementation: str
    reason: str


_CHOOSERS: dict[str, Callable[[torch.device], Choice]] = {}


def register_op(name: str) -> Callable[[Callable[[torch.device], Choice]], Callable[[torch.device], Choice]]:
    """Decorator: the function tells which implementation of op `name` a device gets. Op modules dispatch on the same
    facts, so what it says is what runs."""

    def decorate(chooser: Callable[[torch.device], Choice]) -> Callable[[torch.device], Choice]:
        assert name not in _CHOOSERS, f"op {name} is registered twice"
        _CHOOSERS[name] = chooser
        return chooser

    return decorate


def choice_of(name: str, device: torch.device) -> Choice:
    """What op `name` uses on `device`; its module must have been imported."""
    return _CHOOSERS[name](device)


def registered_ops() -> list[str]:
    """Names of all ops whose modules were imported, sorted."""
    return sorted(_CHOOSERS)
