"""Builds the hooks listed under `hooks` in a config, given as import paths with arguments, or as objects."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from internlm.core.hook_checks import find_problem
from internlm.core.hooks import Hook
from internlm.utils.errors import ConfigError, nearest


def build_user_hooks(entries: Sequence[Any]) -> list[Hook]:
    """Build the hooks of `hooks = [...]`, in order.

    Args:
        entries: each an import path "package.module.Class"; a dict(type=<import path or class>, <argument>=...); a
            subclass of `Hook`; or an instance of one.

    Raises:
        ConfigError: an entry cannot be imported, is not a hook, does not accept its arguments, or has a method that the
            loop cannot call; or two hooks share a name. The message names the entry.
    """
    hooks = [_build(f"hooks[{number}]", entry) for number, entry in enumerate(entries)]
    names: dict[str, int] = {}
    for number, hook in enumerate(hooks):
        problem = find_problem(hook)
        if problem is not None:
            raise ConfigError(f"hooks[{number}]: {problem}")
        if hook.name in names:
            raise ConfigError(
                f"hooks[{number}]: {type(hook).__name__}.name = {hook.name!r} is also that of "
                f"hooks[{names[hook.name]}]; checkpoints store the state of a hook under its name, so change `name` in "
                "one of the classes"
            )
        names[hook.name] = number
    return hooks


def check_user_hooks(entries: Sequence[Any]) -> None:
    """Check entries as `build_user_hooks` does, without building a hook, which may have side effects.

    Raises:
        ConfigError: an entry cannot be imported, is not a hook, or does not accept its arguments.
    """
    for number, entry in enumerate(entries):
        _class_of(f"hooks[{number}]", entry)


def check_names(builtin: Sequence[Hook], user_hooks: Sequence[Hook]) -> None:
    """Refuse a user's hook with the name of a built-in one.

    Raises:
        ConfigError: the message names both.
    """
    taken = {hook.name: type(hook).__name__ for hook in builtin}
    for number, hook in enumerate(user_hooks):
        if hook.name in taken:
            raise ConfigError(
                f"hooks[{number}]: {type(hook).__name__}.name = {hook.name!r} is taken by the built-in "
                f"{taken[hook.name]}; choose another `name` in the class"
            )


def _build(key: str, entry: Any) -> Hook:
    if isinstance(entry, Hook):
        return entry
    cls, arguments = _class_of(key, entry)
    try:
        return cls(**arguments)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{key}: {cls.__name__} could not be built: {_describe(error)}") from error


def _class_of(key: str, entry: Any) -> tuple[Any, dict[str, Any]]:
    """The class of the hook that an entry names, and its arguments (none for an instance)."""
    if isinstance(entry, Hook):
        return type(entry), {}
    arguments: dict[str, Any] = {}
    if isinstance(entry, dict):
        arguments = {name: value for name, value in entry.items() if name != "type"}
        if "type" not in entry:
            raise ConfigError(f'{key} = {entry!r}: give dict(type="package.module.Class", argument=...)')
        entry = entry["type"]
    cls = _import(key, entry) if isinstance(entry, str) else entry
    if not (inspect.isclass(cls) and issubclass(cls, Hook)):
        raise ConfigError(f"{key} = {entry!r} is not a subclass of internlm.core.hooks.Hook, nor an instance of one")
    try:
        inspect.signature(cls).bind(**arguments)
    except TypeError as error:
        raise ConfigError(f"{key}: {cls.__name__}{inspect.signature(cls)}: {error}") from None
    return cls, arguments


def _describe(error: BaseException) -> str:
    """An error, with the line of the user's module that raised it."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if len(frames) > 1 else ""
    return f"{type(error).__name__}: {error}{place}"


def _import(key: str, path: str) -> Any:
    """Import the object at `path`; modules are also searched in the current directory, as `python -m` does."""
    module_name, _, name = path.rpartition(".")
    if not module_name or not all(part.isidentifier() for part in path.split(".")):
        raise ConfigError(f'{key} = {path!r}: expected "package.module.Class"')
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(f"{key} = {path!r}: importing '{module_name}' raised {_describe(error)}") from error
        searched = f"; modules are searched in {os.getcwd()} and where Python finds packages"
        raise ConfigError(f"{key} = {path!r}: {error}{searched}") from None
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{key} = {path!r}: importing '{module_name}' raised {_describe(error)}") from error
    if not hasattr(module, name):
        raise ConfigError(f"{key} = {path!r}: '{module_name}' has no '{name}'.{nearest(name, list(vars(module)))}")
    return getattr(module, name)
