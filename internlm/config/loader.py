"""Loads a config file into a checked `Config`.

Order: run the file, translate older spellings, apply `--set` and other options, build the schema's objects, check the
    rules and refuse unsupported features. All problems are collected in one ConfigError.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from internlm.config.internevo_differences import find_differences
from internlm.config.legacy import Edit, translate_legacy
from internlm.config.notices import find_notices
from internlm.config.origins import DEFAULT, DERIVED, ENVIRONMENT, SET, Origin, locate
from internlm.config.overrides import apply_override, parse_override
from internlm.config.problem import Problem
from internlm.config.python_file import run_config_file
from internlm.config.rules import find_problems
from internlm.config.schema import Config
from internlm.config.schema.base import Section, default_of, key_info, walk_values
from internlm.config.unsupported import find_ineffective, find_unsupported
from internlm.config.validation import build_config
from internlm.utils.errors import ConfigError

_FROM_ENVIRONMENT = ("tensorboard_folder", "resume_tb_folder")


@dataclass(frozen=True)
class LoadedConfig:
    """A checked configuration, with the origin of every value."""

    config: Config
    origins: dict[str, Origin] = field(default_factory=dict)
    """Dotted path of each leaf key -> where its value comes from."""
    notices: list[str] = field(default_factory=list)
    """One line each: older spellings that were translated, values that have no effect."""


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    world_size: int = 1,
    *,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> LoadedConfig:
    """Read and check a config file.

    Args:
        path: a Python file whose globals are the keys; `with read_base():` inherits from others. Names in capitals that
            are not keys, and names with a leading underscore, are the file's own helpers.
        overrides: `key.path=value` texts that override the file.
        world_size: number of ranks the run will have; sizes of groups are checked against it.
        options: command-line option as written -> the values that it sets, by dotted path. They take precedence over
            `overrides`, and their problems name the option.

    Raises:
        ConfigError: with every problem, each with its key, its value and (where it can be known) its file and line.
    """
    path = Path(path)
    tree, origins = read_tree(path)
    notices = translate_legacy(tree, origins)
    for text in overrides:
        notices += apply_override(*parse_override(text, Config), SET, tree, origins, Config)
    for option, values in (options or {}).items():
        for key, value in values.items():
            notices += apply_override(key, value, Origin("override", option=option), tree, origins, Config)
    for name in _FROM_ENVIRONMENT:
        if tree.get(name) is None and os.environ.get(name):
            tree[name] = os.environ[name]
            origins[name] = ENVIRONMENT

    config, problems = build_config(tree)
    broken = [key for problem in problems for key in problem.keys[:1]]
    problems += [
        problem
        for problem in (*find_problems(config, world_size), *find_unsupported(config))
        if not any(_touches(key, bad) for key in problem.keys for bad in broken)
    ]
    if problems:
        raise ConfigError(_describe(problem, origins, path) for problem in problems)

    def given(key: str) -> Any:
        edit = Edit(tree, {})
        return edit.get(key) if edit.has(key) else None

    notices += find_ineffective(config, given)
    notices += find_notices(config, given, world_size)
    notices += find_differences(config, given)
    return LoadedConfig(config, _origins_of(config, tree, origins), notices)


def read_tree(path: Path) -> tuple[dict[str, Any], dict[str, Origin]]:
    """The keys of a config file, unchecked, and their origins.

    Raises:
        ConfigError: the file is missing, is not valid Python, or raises an exception.
    """
    file = run_config_file(path)
    tree = {
        name: _plain(value) for name, value in file.values.items() if name in Config.model_fields or not name.isupper()
    }
    return tree, file.origins


def check_config(config: Config, world_size: int = 1) -> None:
    """Check a Config that was built in Python. Raises ConfigError with every problem."""
    problems = [problem.text for problem in (*find_problems(config, world_size), *find_unsupported(config))]
    if problems:
        raise ConfigError(problems)


def _plain(value: Any) -> Any:
    """Convert section objects to dicts and paths to text, and copy mappings."""
    if isinstance(value, Section):
        return {name: _plain(getattr(value, name)) for name in value.model_fields_set}
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return str(value) if isinstance(value, Path) else value


def _touches(key: str, bad: str) -> bool:
    """Whether the paths are equal or one is below the other."""
    return key == bad or key.startswith(bad + ".") or bad.startswith(key + ".")


def _describe(problem: Problem, origins: Mapping[str, Origin], path: Path) -> str:
    """The text, prefixed by the location of the first key that has one."""
    found: Iterable[Origin | None] = (locate(key, origins) for key in problem.keys)
    location = next((str(origin) for origin in found if origin is not None), str(path))
    return f"{location}: {problem.text}"


def _origins_of(config: Config, tree: dict[str, Any], origins: Mapping[str, Origin]) -> dict[str, Origin]:
    edit = Edit(tree, {})
    result = {}
    for path, declared, value in walk_values(config):
        info = key_info(declared)
        assert info is not None, path
        if edit.has(path) and not info.forced and not (info.derived and edit.get(path) is None):
            result[path] = locate(path, origins) or DEFAULT
        elif info.derived or value != default_of(declared):
            result[path] = DERIVED
        else:
            result[path] = DEFAULT
    return result
