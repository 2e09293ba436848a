"""Validates a plain dict against the schema, and translates each type error for the user."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from internlm.config.problem import Problem
from internlm.config.schema import Config
from internlm.config.schema.base import Section, is_required, item_class, section_class, walk_schema
from internlm.config.unsupported import feature_of
from internlm.utils.errors import ConfigError, nearest

_DEPTH = 8
"""Rounds of validation, more than the nesting depth of sections: each removes the problems that the previous one
uncovered."""


def build_config(tree: dict[str, Any]) -> tuple[Config, list[Problem]]:
    """Build the Config of a tree of sections; return it with the problems found.

    If there are problems, the Config has defaults (1 for a key without one) in place of the invalid values, so that
    rules between the other keys can still run. Use it for nothing else.
    """
    tree = _copy(tree)
    problems: list[Problem] = []
    for _ in range(_DEPTH):
        try:
            return Config.model_validate(tree), problems
        except ValidationError as error:
            found = _translate(error)
            problems = problems or found
            for problem in found:
                _remove_invalid(problem.keys[0], tree)
    raise ConfigError(problem.text for problem in problems)


def _copy(tree: dict[str, Any]) -> dict[str, Any]:
    """Copy the sections of a tree. Values are shared: a hook may be an object that cannot be copied."""
    return {name: _copy(value) if isinstance(value, dict) else value for name, value in tree.items()}


def _translate(error: ValidationError) -> list[Problem]:
    """One problem per key, also of the dicts in a list; the branches of a union are joined."""
    texts: dict[str, list[str]] = {}
    values: dict[str, Any] = {}
    paths: dict[str, str] = {}
    for part in error.errors(include_url=False):
        path = _key_path(part["loc"])
        item, known = _item_key(path, part["loc"])
        kind, value = part["type"], part["input"]
        paths[item] = path
        if known and kind == "extra_forbidden":
            texts[item] = [
                f"{item} is not a known key.{nearest(item.rpartition('.')[2], known) or f' Known: {known}.'}"
            ]
        elif known and kind == "missing":
            texts[item] = [f"{item} is missing"]
        elif kind == "extra_forbidden":
            feature = feature_of(path)
            named = f"{path} = {_short(value)}: {feature} is not yet supported; leave it out"
            texts[path] = [named if feature else f"{path} is not a known key.{_suggest(path)}"]
        elif kind == "missing":
            texts[path] = [_missing(path)]
        else:
            values.setdefault(item, value)
            texts.setdefault(item, []).append(_expected(kind, part.get("ctx", {}), part["msg"]))
    result = []
    for item, expected in texts.items():
        if item in values:
            text = f"{item} = {_short(values[item])}: it must be {' or '.join(dict.fromkeys(expected))}"
        else:
            text = expected[0]
        result.append(Problem((paths[item],), text))
    return result


def _expected(kind: str, context: dict[str, Any], message: str) -> str:
    if kind == "literal_error":
        return f"one of {context['expected']}"
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        return "a dict"
    if kind == "none_required":
        return "None"
    if kind == "string_too_short":
        return "a non-empty string"
    for start in ("Input should be ", "Value error, "):
        message = message.removeprefix(start)
    return message


def _missing(path: str) -> str:
    field = _field(path)
    nested = section_class(field) if field is not None else None
    if nested is None:
        return f"{path} is missing: {field.description if field is not None else 'it has no default'}"
    needed = ", ".join(name for name, inner in nested.model_fields.items() if is_required(inner))
    return f"{path} is missing: give {path} = dict(...) with at least {needed}"


def _suggest(path: str) -> str:
    """A known key that the user may have meant: beside it, or of the same name elsewhere."""
    outer, _, name = path.rpartition(".")
    cls: type[Section] | None = Config
    if outer:
        field = _field(outer)
        cls = section_class(field) if field is not None else None
    siblings = list(cls.model_fields) if cls is not None else []
    beside = nearest(name, siblings)
    if beside:
        return beside
    elsewhere = [known for known, _ in walk_schema(Config) if known.rpartition(".")[2] == name]
    if elsewhere:
        return f" There is '{elsewhere[0]}'."
    if not outer:
        return " A helper of the file itself is written in capitals or with a leading underscore."
    return f" Known keys of {outer}: {', '.join(siblings)}."


def _field(path: str) -> FieldInfo | None:
    cls: type[Section] | None = Config
    field: FieldInfo | None = None
    for name in path.split("."):
        field = cls.model_fields.get(name) if cls is not None else None
        if field is None:
            return None
        cls = section_class(field)
    return field


def _key_path(location: tuple[int | str, ...]) -> str:
    """pydantic's location as a key path: without the branches of unions and the positions inside a value."""
    parts: list[str] = []
    cls: type[Section] | None = Config
    for part in location:
        if cls is None:
            break
        parts.append(str(part))
        field = cls.model_fields.get(str(part))
        cls = section_class(field) if field is not None else None
    return ".".join(parts)


def _item_key(path: str, location: tuple[int | str, ...]) -> tuple[str, list[str]]:
    """The key of an error inside a list of sections, as `list[number].key`, and the known keys of its items."""
    field = _field(path)
    cls = item_class(field) if field is not None else None
    inside = location[path.count(".") + 1 :]
    known: list[str] = []
    while cls is not None and len(inside) >= 2:
        path, known = f"{path}[{inside[0]}].{inside[1]}", list(cls.model_fields)
        field = cls.model_fields.get(str(inside[1]))
        cls = item_class(field) if field is not None else None
        inside = inside[2:]
    return path, known


def _remove_invalid(path: str, tree: dict[str, Any]) -> None:
    """Remove an invalid value; where the key is required, insert one that validates."""
    *outer, name = path.split(".")
    place = tree
    for part in outer:
        inner = place.get(part)
        if not isinstance(inner, dict):
            inner = place[part] = {}
        place = inner
    place.pop(name, None)
    field = _field(path)
    if field is None or not is_required(field):
        return
    if section_class(field) is not None:
        place[name] = {}
    elif field.annotation is int:
        place[name] = 1
    else:
        _remove_invalid(".".join(outer), tree)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
