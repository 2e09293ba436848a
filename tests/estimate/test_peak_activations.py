"""The moment of a step at which a rank holds the most activations."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from internlm.core.scheduler.actions import Action, ActionKind
from internlm.estimate.memory import peak_activations


@pytest.mark.parametrize(
    ("order", "peak"),
    [
        ("F0 B0 F1 B1", 30),
        ("F0 F1 B0 F2 B1 B2", 60),
        # Freed by the weight gradients, not by those of the input.
        ("F0 I0 W0 F1 I1 W1", 30),
        ("F0 I0 F1 I1 W0 W1", 60),
    ],
)
def test_peak_of_a_schedule(order: str, peak: float) -> None:
    """A layer of 10 bytes and one of 20."""
    actions = [Action(ActionKind(action[0]), int(action[1]), 0) for action in order.split()]
    sizes = {"everything": 20.0, "nothing": 10.0}
    layer = cast(Any, SimpleNamespace(of=lambda _: SimpleNamespace(saved_bytes=sizes.__getitem__)))
    assert peak_activations(actions, [[0, 1]], layer, {0: "everything", 1: "nothing"}) == peak
