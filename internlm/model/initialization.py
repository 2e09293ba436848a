"""Initializers: the distribution of a parameter's initial values, attached to the parameter.

A model is built without storage. `core/parallel/materialize.py` allocates the local part of each parameter and calls
`fill` on one block of values at a time, with a generator keyed by seed, global name and block, so that all layouts
start from the same weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_ATTRIBUTE = "internlm_initializer"


class Initializer(Protocol):
    """The distribution of a parameter's initial values.

    Elements are independent, so parts can be filled separately, unless the initializer has a true attribute
    `draws_whole`: then `fill` gets a tensor of the shape of the whole parameter.
    """

    def fill(self, tensor: Tensor, generator: torch.Generator | None = None) -> None:
        """Fill `tensor`, of any shape and on the generator's device, in place."""


@dataclass(frozen=True)
class Normal:
    """Normal distribution with mean 0 and standard deviation `std`."""

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
    """All ones."""

    def fill(self, tensor: Tensor, generator: torch.Generator | None = None) -> None:
        with torch.no_grad():
            tensor.fill_(1.0)


@dataclass(frozen=True)
class Zeros:
    """All zeros."""

    def fill(self, tensor: Tensor, generator: torch.Generator | None = None) -> None:
        with torch.no_grad():
            tensor.zero_()


def set_initializer(parameter: Tensor, initializer: Initializer) -> None:
    """Attach an initializer to a parameter. (`nn.Module.to_empty` replaces parameters and loses it.)"""
    setattr(parameter, _ATTRIBUTE, initializer)


def initializer_of(parameter: Tensor) -> Initializer:
    """The initializer attached to a parameter. Every parameter of a registered model has one.

    Raises:
        ValueError: the parameter has none.
    """
    initializer: Initializer | None = getattr(parameter, _ATTRIBUTE, None)
    if initializer is None:
        raise ValueError(f"a parameter of shape {tuple(parameter.shape)} has no initializer; call set_initializer")
    return initializer
