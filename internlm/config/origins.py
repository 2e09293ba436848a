"""Where the value of a key comes from, down to the line of a config file.

Lines are found by reading the file's syntax tree: assignments, `dict(...)` and `{...}` literals, `x["key"] = ...` and
`x.update(...)`. A key that is set in another way gets the line of the nearest enclosing part. Of the branches of an
`if`, the last one counts.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Origin:
    """The source of one value."""

    kind: Literal["default", "derived", "file", "override", "environment"]
    file: str = ""
    line: int = 0
    option: str = ""
    """Of an override: the option as written on the command line."""

    def __str__(self) -> str:
        if self.kind == "file":
            return f"{self.file}:{self.line}"
        return self.option or self.kind


DEFAULT = Origin("default")
DERIVED = Origin("derived")
SET = Origin("override", option="--set")
ENVIRONMENT = Origin("environment")


def locate(path: str, origins: Mapping[str, Origin]) -> Origin | None:
    """The origin of `path`, or of the nearest enclosing section that has one, or of something below it."""
    outer = path
    while outer:
        if outer in origins:
            return origins[outer]
        outer = outer.rpartition(".")[0]
    return next((origin for known, origin in origins.items() if known.startswith(path + ".")), None)


def forget(path: str, origins: dict[str, Origin]) -> None:
    """Drop a path and everything below it."""
    for known in [p for p in origins if p == path or p.startswith(path + ".")]:
        del origins[known]


def move(old: str, new: str, origins: dict[str, Origin]) -> None:
    """Move the origins of `old` and everything below it to `new`."""
    for known in [p for p in origins if p == old or p.startswith(old + ".")]:
        origins[new + known[len(old) :]] = origins.pop(known)


def record_statement(node: ast.stmt, file: str, origins: dict[str, Origin]) -> None:
    """Record the lines of the keys that one statement sets."""
    if isinstance(node, ast.Assign):
        for target in node.targets:
            _record_assignment(target, node.value, file, origins)
    elif isinstance(node, ast.AnnAssign | ast.AugAssign) and node.value is not None:
        _record_assignment(node.target, node.value, file, origins)
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        function = node.value.func
        if isinstance(function, ast.Attribute) and function.attr == "update":
            path = _path_of(function.value)
            if path is not None:
                _record_call(node.value, path, file, origins)


def _record_assignment(target: ast.expr, value: ast.expr, file: str, origins: dict[str, Origin]) -> None:
    if isinstance(target, ast.Tuple | ast.List):
        parts: Iterable[ast.expr] = (
            value.elts
            if isinstance(value, ast.Tuple | ast.List) and len(value.elts) == len(target.elts)
            else [value] * len(target.elts)
        )
        for name, part in zip(target.elts, parts, strict=True):
            _record_assignment(name, part, file, origins)
        return
    path = _path_of(target)
    if path is not None:
        forget(path, origins)
        origins[path] = Origin("file", file, target.lineno)
        _record_value(value, path, file, origins)


def _record_value(value: ast.expr, path: str, file: str, origins: dict[str, Origin]) -> None:
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "dict":
        _record_call(value, path, file, origins)
    elif isinstance(value, ast.Dict):
        for name, item in zip(value.keys, value.values, strict=True):
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                origins[f"{path}.{name.value}"] = Origin("file", file, name.lineno)
                _record_value(item, f"{path}.{name.value}", file, origins)


def _record_call(call: ast.Call, path: str, file: str, origins: dict[str, Origin]) -> None:
    """The arguments of `dict(...)` or `x.update(...)`."""
    for argument in call.args:
        _record_value(argument, path, file, origins)
    for keyword in call.keywords:
        if keyword.arg is not None:
            origins[f"{path}.{keyword.arg}"] = Origin("file", file, keyword.lineno)
            _record_value(keyword.value, f"{path}.{keyword.arg}", file, origins)


def _path_of(node: ast.expr) -> str | None:
    """`model` and `model["a"]["b"]` as dotted paths; None for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str):
        outer = _path_of(node.value)
        return None if outer is None else f"{outer}.{node.slice.value}"
    return None
