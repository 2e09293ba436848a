"""Checks of hooks before they cost a run: their names, their methods, and the state that they save."""

from __future__ import annotations

import inspect
from typing import Any

from internlm.core.hooks import Hook, overrides
from internlm.utils.errors import CheckpointError, nearest

_EVENTS = {
    name: list(inspect.signature(method).parameters)[1:]
    for name, method in vars(Hook).items()
    if inspect.isfunction(method)
}
"""Method of `Hook` -> the names of its arguments."""


def find_problem(hook: Hook) -> str | None:
    """The reason why the loop cannot call a hook or save its state; None when it can.

    A misspelt method would never be called, and a wrong argument list would only fail when its event comes, such as the
    first checkpoint.
    """
    cls = type(hook).__name__
    if not isinstance(hook.name, str) or not hook.name:
        return f"{cls}.name = {hook.name!r}: it must be a non-empty string, under which checkpoints store its state"
    for name in dir(hook):
        if name.startswith("on_") and name not in _EVENTS:
            return (
                f"{cls}.{name} is never called.{nearest(name, _EVENTS)} Names that start with 'on_' are those of "
                "events (doc/hooks.md); rename it if it is a method of your own"
            )
    for name, arguments in _EVENTS.items():
        if overrides(hook, name):
            try:
                signature = inspect.signature(getattr(hook, name))
            except (TypeError, ValueError):  # a builtin
                continue
            try:
                signature.bind(*arguments)
            except TypeError as error:
                return f"{cls}.{name}{signature} is called with ({', '.join(arguments)}): {error}"
    return None


def state_of(hook: Hook) -> dict[str, Any]:
    """The state of a hook, as it is saved with a checkpoint.

    Raises:
        CheckpointError: it is not a dict of JSON values, and would not be restored as it was.
    """
    state = hook.state_dict()
    what = f"hook '{hook.name}': {type(hook).__name__}.state_dict()"
    if not isinstance(state, dict):
        raise CheckpointError(f"{what} returned a {type(state).__name__}, not a dict")
    problem = _find_non_json(state, "", ())
    if problem is not None:
        raise CheckpointError(f"{what}{problem}")
    return state


def _find_non_json(value: Any, place: str, outer: tuple[int, ...]) -> str | None:
    if value is None or isinstance(value, (bool, int, float, str)):
        return None
    if id(value) in outer:
        return f"{place} contains itself"
    inner = (*outer, id(value))
    if isinstance(value, (list, tuple)):
        found = (_find_non_json(item, f"{place}[{number}]", inner) for number, item in enumerate(value))
        return next((problem for problem in found if problem is not None), None)
    if not isinstance(value, dict):
        return f"{place} is a {type(value).__name__}: use JSON values (numbers, strings, lists, dicts, None)"
    for key, item in value.items():
        if not isinstance(key, str):
            return f"{place}[{key!r}]: keys must be strings, as JSON has no others"
        problem = _find_non_json(item, f"{place}[{key!r}]", inner)
        if problem is not None:
            return problem
    return None
