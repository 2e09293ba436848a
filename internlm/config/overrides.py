"""Values from the command line: `--set key.path=value`, typed by the schema, and other options that set keys."""

from __future__ import annotations

import ast
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError

from internlm.config.legacy import translate_legacy
from internlm.config.origins import Origin, forget
from internlm.config.schema.base import Section, section_class
from internlm.utils.errors import ConfigError

_OTHER_NULLS = ("null", "nil", "undefined")


def parse_override(text: str, schema: type[Section]) -> tuple[str, Any]:
    """Parse `key.path=value` into (path, value).

    The value is parsed as a Python literal, or `dict(...)` of literals; any other text is a string. A text for which
    the schema expects a string is a string even if it is a literal (JOB_NAME=7).

    Raises:
        ConfigError: there is no equals sign or no key, or the value is the null of another language.
    """
    path, equals, raw = text.partition("=")
    path, raw = path.strip(), raw.strip()
    if not equals or not path or not all(part for part in path.split(".")):
        raise ConfigError(f"--set {text}: expected key.path=value, such as --set data.total_steps=100")
    wanted = _type_of(path, schema)
    if raw.lower() in _OTHER_NULLS and wanted is not None and _fits(None, wanted):
        raise ConfigError(f"--set {text}: values are written as in Python: use --set {path}=None")
    try:
        value = _literal(raw)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return path, raw
    if wanted is not None and not _fits(value, wanted) and _fits(raw, wanted):
        return path, raw
    return path, value


def _literal(text: str) -> Any:
    """The value of a Python literal, in which dicts may be written as `dict(key=value)`, as configs do."""
    return ast.literal_eval(_DictCalls().visit(ast.parse(text, mode="eval")))


class _DictCalls(ast.NodeTransformer):
    """Turns `dict(key=value)` into `{"key": value}`."""

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        names = [keyword.arg for keyword in node.keywords]
        if not isinstance(node.func, ast.Name) or node.func.id != "dict" or node.args or None in names:
            return node
        return ast.Dict([ast.Constant(name) for name in names], [keyword.value for keyword in node.keywords])


def apply_override(
    path: str, value: Any, origin: Origin, tree: dict[str, Any], origins: dict[str, Origin], schema: type[Section]
) -> list[str]:
    """Set one value in the tree of a config file. Returns the notices of older spellings."""
    single: dict[str, Any] = {}
    place = single
    *outer, name = path.split(".")
    for part in outer:
        place = place.setdefault(part, {})
    place[name] = value
    notices = translate_legacy(single, {})
    _merge(single, origin, tree, origins, schema, path, "")
    return notices


def _merge(
    new: dict[str, Any],
    origin: Origin,
    tree: dict[str, Any],
    origins: dict[str, Origin],
    cls: type[Section] | None,
    target: str,
    prefix: str,
) -> None:
    """Merge `new` into `tree`: sections, and dicts on the path to `target`, key by key; other dicts are replaced."""
    for name, value in new.items():
        field = cls.model_fields.get(name) if cls is not None else None
        nested = section_class(field) if field is not None else None
        if isinstance(value, dict) and (nested is not None or target.startswith(f"{prefix}{name}.")):
            inner = tree.get(name)
            if not isinstance(inner, dict):
                inner = tree[name] = {}
                forget(prefix + name, origins)
                origins[prefix + name] = origin
            _merge(value, origin, inner, origins, nested, target, f"{prefix}{name}.")
        else:
            tree[name] = value
            forget(prefix + name, origins)
            origins[prefix + name] = origin


def _type_of(path: str, schema: type[Section]) -> Any:
    """The type that the schema has for a path, with its validators; None for an unknown path."""
    cls: type[Section] | None = schema
    wanted: Any = None
    for name in path.split("."):
        field = cls.model_fields.get(name) if cls is not None else None
        if field is None:
            return None
        wanted, cls = field.annotation, section_class(field)
        for validator in field.metadata:
            wanted = Annotated[wanted, validator]
    return wanted


def _fits(value: Any, wanted: Any) -> bool:
    try:
        TypeAdapter(wanted).validate_python(value)
    except ValidationError:
        return False
    return True
