"""What a parameter refers to is freed with it."""

from __future__ import annotations

import gc
import weakref

import torch
from torch import Tensor, nn

from internlm.core.parallel.parameter_events import subscribe


class Owner:
    """Refers to its parameters, as an optimizer does."""

    def __init__(self) -> None:
        self.parameter = nn.Parameter(torch.ones(3))
        self.received: list[Tensor] = []
        subscribe(self.parameter, self.receive, lambda: None)

    def receive(self, gradient: Tensor) -> None:
        self.received.append(gradient)


def test_an_owner_of_parameters_is_freed() -> None:
    owner = Owner()
    (2 * owner.parameter).sum().backward()
    assert torch.equal(owner.received[0], torch.full((3,), 2.0)) and owner.parameter.grad is None
    gone = weakref.ref(owner)
    del owner
    gc.collect()
    assert gone() is None
