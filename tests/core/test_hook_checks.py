"""Hooks that the loop cannot call, and states that JSON cannot hold, are refused before they cost a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import new_trainer

from internlm.core.hook_checks import find_problem, state_of
from internlm.core.hooks import Hook
from internlm.utils.errors import CheckpointError


class Stateful(Hook):
    """Saves a given state."""

    name = "stateful"

    def __init__(self, state: Any) -> None:
        self.state = state
        self.num_saves = 0

    def state_dict(self) -> Any:
        self.num_saves += 1
        return self.state


class Misspelt(Hook):
    """Listens to an event that does not exist."""

    def on_step_ends(self, trainer: Any, metrics: Any) -> None: ...


class TooFew(Hook):
    """Lacks an argument."""

    def on_checkpoint_saved(self, trainer: Any) -> None: ...


class TooMany(Hook):
    """Has another required argument."""

    def on_fit_end(self, trainer: Any, reason: str) -> None: ...


class Fine(Hook):
    """Uses other argument names, and more arguments with defaults."""

    def on_step_end(self, loop: Any, values: Any, every: int = 2) -> None: ...

    def on_fit_end(self, *everything: Any) -> None: ...


class Numbered(Hook):
    """Has a number as its name."""

    name = 5  # type: ignore[assignment]


class Nameless(Hook):
    """Has no name."""

    name = ""


def with_attribute() -> Hook:
    hook = Hook()
    hook.on_stepend = lambda trainer, metrics: None  # type: ignore[attr-defined]
    return hook


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (Misspelt, r"Misspelt.on_step_ends is never called. Did you mean 'on_step_end'\?"),
        (with_attribute, r"Hook.on_stepend is never called. Did you mean 'on_step_end'\?"),
        (TooFew, r"TooFew.on_checkpoint_saved\(trainer.*\) .*is called with \(trainer, path\): too many"),
        (TooMany, r"TooMany.on_fit_end.* is called with \(trainer\): missing a required argument: 'reason'"),
        (Numbered, "Numbered.name = 5: it must be a non-empty string"),
        (Nameless, "Nameless.name = '': it must be a non-empty string"),
    ],
)
def test_hooks_that_cannot_be_called_are_refused(build: Callable[[], Hook], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        new_trainer(None, 1, hooks=[build()])


def test_methods_that_can_be_called_are_accepted() -> None:
    assert find_problem(Fine()) is None
    new_trainer(None, 1, hooks=[Fine()]).fit()


def cyclic() -> dict[str, Any]:
    state: dict[str, Any] = {}
    state["inner"] = [state]
    return state


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"best": torch.ones(2)}, r"\['best'\] is a Tensor: use JSON values"),
        ({"seen": [{"ids": {1}}]}, r"\['seen'\]\[0\]\['ids'\] is a set: use JSON values"),
        ({"counts": {1: 2}}, r"\['counts'\]\[1\]: keys must be strings"),
        (cyclic(), r"\['inner'\]\[0\] contains itself"),
        (None, "returned a NoneType, not a dict"),
        ([1], "returned a list, not a dict"),
    ],
)
def test_a_state_that_json_cannot_hold_is_refused_before_the_first_step(tmp_path: Path, state: Any, words: str) -> None:
    trainer = new_trainer(tmp_path, 2, every=2, hooks=[Stateful(state)])
    with pytest.raises(CheckpointError, match=rf"hook 'stateful': Stateful.state_dict\(\).*{words}"):
        trainer.fit()
    assert trainer.state.step == 0
    assert str(trainer.progress).endswith("stateful: state_dict")


def test_json_values_are_accepted() -> None:
    shared = [1]
    state = {"a": None, "b": [True, 1, 2.5, "x", {"c": (1, 2)}], "d": math.inf, "e": shared, "f": shared}
    assert state_of(Stateful(state)) is state


def test_a_run_that_saves_nothing_asks_for_no_state() -> None:
    hook = Stateful({"best": torch.ones(2)})
    new_trainer(None, 1, hooks=[hook]).fit()
    assert hook.num_saves == 0
