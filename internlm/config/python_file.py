"""Runs a config file: Python in, a dict of its globals and their lines out.

Owns `read_base` inheritance and the translation of Python's errors into `ConfigError`. Knows nothing of the schema.
"""

from __future__ import annotations
import __future__

import ast
import os
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from internlm.config.origins import Origin, forget, record_statement
from internlm.utils.errors import ConfigError

_INCLUDE = "__include__"
_NOT_VALUES = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type, __future__._Feature)


@dataclass
class PythonFile:
    """The public globals of a config file, and where each (and each key inside) was set."""

    values: dict[str, Any]
    origins: dict[str, Origin] = field(default_factory=dict)


def run_config_file(path: Path) -> PythonFile:
    """Run a config file and the files it inherits from.

    Raises:
        ConfigError: a file is missing, is not valid Python, or raises an exception; with file and line.
    """
    result = _run(path, ())
    result.values = {name: value for name, value in result.values.items() if not isinstance(value, _NOT_VALUES)}
    return result


def _run(path: Path, including: tuple[Path, ...]) -> PythonFile:
    real = Path(os.path.realpath(path))  # accepts a link to itself, unlike Path.resolve
    if real in including:
        chain = " -> ".join(str(p) for p in (*including, real))
        raise ConfigError(f"{path}: the config inherits from itself: {chain}")
    including = (*including, real)
    tree = _parse(path)
    tree = ast.fix_missing_locations(_Inheritance(path).visit(tree))

    namespace: dict[str, Any] = {"__file__": str(path), "__name__": path.stem}
    included: dict[int, PythonFile] = {}

    def include(line: int, names: list[tuple[str, int, str, str | None]]) -> None:
        part = included.setdefault(line, PythonFile({}))
        for module, level, name, alias in names:
            base = _run(_find_base(module, level, path, line), including)
            _take(base, name, alias or name, part, f"{path}:{line}")
        namespace.update(part.values)

    namespace[_INCLUDE] = include
    try:
        exec(compile(tree, str(path), "exec"), namespace)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{_line_of(error, path)}: {type(error).__name__}: {error}") from None

    result = PythonFile({name: value for name, value in namespace.items() if not name.startswith("_")})
    for statement in _statements(tree.body):
        line = _included_line(statement)
        if line is None:
            record_statement(statement, str(path), result.origins)
        elif line in included:
            for name in included[line].values:
                forget(name, result.origins)
            result.origins.update(included[line].origins)
    return result


def _parse(path: Path) -> ast.Module:
    try:
        source = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path}: the config file does not exist") from None
    except OSError as error:
        raise ConfigError(f"{path}: the config file cannot be read: {error.strerror}") from None
    try:
        return ast.parse(source, str(path))
    except SyntaxError as error:
        raise ConfigError(f"{path}:{error.lineno or 1}: {type(error).__name__}: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # A null byte, on some versions of Python; too many brackets.
        raise ConfigError(f"{path}: not a Python file: {error}") from None


class _Inheritance(ast.NodeTransformer):
    """Turns `with read_base(): from x import y` into a call that runs x there, and drops the import of read_base."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.stmt:
        rest = [name for name in node.names if name.name != "read_base"]
        if len(rest) == len(node.names):
            return node
        new: ast.stmt = ast.ImportFrom(node.module, rest, node.level) if rest else ast.Pass()
        return ast.copy_location(new, node)

    def visit_With(self, node: ast.With) -> ast.stmt:
        if not any(_is_read_base(item.context_expr) for item in node.items):
            self.generic_visit(node)
            return node
        names = []
        for statement in node.body:
            if not isinstance(statement, ast.ImportFrom):
                raise ConfigError(f"{self.path}:{statement.lineno}: only `from ... import ...` may be in read_base()")
            names += [(statement.module or "", statement.level, name.name, name.asname) for name in statement.names]
        arguments: list[ast.expr] = [ast.Constant(node.lineno), ast.parse(repr(names), mode="eval").body]
        call = ast.Expr(ast.Call(ast.Name(_INCLUDE, ast.Load()), arguments, []))
        return ast.copy_location(call, node)


def _is_read_base(node: ast.expr) -> bool:
    if not isinstance(node, ast.Call):
        return False
    function = node.func
    return getattr(function, "id", None) == "read_base" or getattr(function, "attr", None) == "read_base"


def _included_line(node: ast.stmt) -> int | None:
    """The line of a `read_base` block, if the statement stands for one."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        call = node.value
        if isinstance(call.func, ast.Name) and call.func.id == _INCLUDE and isinstance(call.args[0], ast.Constant):
            return int(str(call.args[0].value))
    return None


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """All statements of a module in order, those inside if, for, try and with too, but not those of functions."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.For | ast.While | ast.With | ast.Try):
            for name in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(node, name, []))


def _find_base(module: str, level: int, path: Path, line: int) -> Path:
    relative = Path(*module.split(".")).with_suffix(".py") if module else Path("__init__.py")
    folder = path.resolve().parent
    if level:
        folders = [folder.parents[level - 2] if level > 1 else folder]
    else:
        folders = [folder, *folder.parents, Path.cwd()]
    for candidate in folders:
        base = candidate / relative
        if base.is_file():
            near = not path.is_absolute() and base.is_relative_to(Path.cwd())
            return base.relative_to(Path.cwd()) if near else base
    searched = str(folders[0]) if level else f"{folder}, the folders above it, and {Path.cwd()}"
    raise ConfigError(f"{path}:{line}: the base config {relative} was not found (searched: {searched})")


def _take(base: PythonFile, name: str, alias: str, into: PythonFile, place: str) -> None:
    """Copy one name (or all, for `*`) of a base file, with its lines."""
    if name != "*" and name not in base.values:
        raise ConfigError(f"{place}: the base config has no '{name}'")
    for known in list(base.values) if name == "*" else [name]:
        new = known if name == "*" else alias
        into.values[new] = base.values[known]
        forget(new, into.origins)
        for path, origin in base.origins.items():
            if path == known or path.startswith(known + "."):
                into.origins[new + path[len(known) :]] = origin


def _line_of(error: BaseException, path: Path) -> str:
    """file:line of the deepest frame of an exception in the config file."""
    line, frame = 0, error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == str(path):
            line = frame.tb_lineno
        frame = frame.tb_next
    return f"{path}:{line}" if line else str(path)
