"""How a parameter gets its first values: a recipe attached to it, carried out by whoever materialises the model.

A model is built without storage. Each parameter carries an `Initializer`; the parallel floor makes the storage and
calls `fill` with a generator keyed by seed and global parameter name, so every layout starts from the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_ATTRIBUTE = "internlm_initializer"


class Initializer(Protocol):
    """A recipe for the values of a parameter."""

    def fill(self, tensor: Tensor, generator: torch.Generator | None = None) -> None:
        """Overwrite `tensor` (of any shape, on the generator's device) in place, without gradient."""


@dataclass(frozen=True)
class Normal:
    """Normal distribution around 0 with standard deviation `std`."""

    std: float

    def fill(self, tensor: Tensor, generator: torch.Generator | None = None) -> None:
        with torch.no_grad():
            tensor.normal_(0.0, self.std, generator=generator)


@dataclass(frozen=True)
class Uniform:
    """Uniform distribution over [-bound, bound]."""

    bound: float

    def fill(self, tensor: Tensor, generator: torch.Generator | None = None) -> None:
        with torch.no_grad():
            tensor.uniform_(-self.bound, self.bound, generator=generator)


@dataclass(frozen=True)
class Ones:
    def fill(self, tensor: Tensor, generator: torch.Generator | None = None) -> None:
        with torch.no_grad():
            tensor.fill_(1.0)


@dataclass(frozen=True)
class Zeros:
    def fill(self, tensor: Tensor, generator: torch.Generator | None = None) -> None:
        with torch.no_grad():
            tensor.zero_()


def set_initializer(parameter: Tensor, initializer: Initializer) -> None:
    """Attach the recipe to the parameter. (`nn.Module.to_empty` makes new parameters: read the recipes before it.)"""
    setattr(parameter, _ATTRIBUTE, initializer)


def initializer_of(parameter: Tensor) -> Initializer:
    """The recipe attached to the parameter. Every parameter of a registered model has one.

    Raises:
        ValueError: it has none.
    """
    initializer: Initializer | None = getattr(parameter, _ATTRIBUTE, None)
    if initializer is None:
        raise ValueError(f"a parameter of shape {tuple(parameter.shape)} has no initializer; call set_initializer")
    return initializer
