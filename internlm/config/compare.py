"""Compares two configs key by key, and marks the differences that change the model's outputs."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from internlm.config.schema import BlendEntryConfig, Config
from internlm.config.schema.base import Section, key_info, walk_schema

_MAX_SHOWN = 12
"""Values of a dict in a message."""

_ABSENT = object()


@dataclass(frozen=True)
class Change:
    """One key whose value differs.

    Attributes:
        path: dotted path of the key.
        old: value in the first config; of a section, the values that differ from its defaults.
        new: likewise in the second config.
        changes_outputs: whether the same weights give other outputs.
    """

    path: str
    old: Any
    new: Any
    changes_outputs: bool

    def __str__(self) -> str:
        """One line; of two dicts, the values that differ, at most `_MAX_SHOWN` of them."""
        if not (isinstance(self.old, Mapping) and isinstance(self.new, Mapping)):
            return f"{self.path}: {self.old!r} -> {self.new!r}"
        lines = list(_differing_values(self.old, self.new))
        more = f", and {len(lines) - _MAX_SHOWN} more" if len(lines) > _MAX_SHOWN else ""
        return f"{self.path}: {', '.join(lines[:_MAX_SHOWN])}{more}"


def _differing_values(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """`name before -> after` of each value that differs, also in dicts within; what a dict lacks is "absent"."""
    for name in dict.fromkeys([*old, *new]):
        before, after = old.get(name, _ABSENT), new.get(name, _ABSENT)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _differing_values(before, after, f"{prefix}{name}.")
        elif before != after:
            yield f"{prefix}{name} {_shortened(before)} -> {_shortened(after)}"


def _shortened(value: Any) -> str:
    if value is _ABSENT:
        return "absent"
    return repr(value) if isinstance(value, str) else reprlib.repr(value)


def changes_between(old: Config, new: Config) -> list[Change]:
    """Every key whose value differs, in schema order. A section that was added or removed counts as one key."""
    return list(_changes(old, new, keys_that_change_outputs(), ""))


def keys_that_change_outputs() -> frozenset[str]:
    """Dotted paths of the keys that the schema declares to change outputs."""
    infos = {path: key_info(field) for path, field in walk_schema(Config)}
    return frozenset(path for path, info in infos.items() if info is not None and info.changes_outputs)


def _changes(old: Section, new: Section, marked: frozenset[str], prefix: str) -> Iterator[Change]:
    for name in type(new).model_fields:
        before, after, path = getattr(old, name), getattr(new, name), prefix + name
        if isinstance(before, Section) and isinstance(after, Section):
            yield from _changes(before, after, marked, f"{path}.")
        elif path == "data.blend":
            yield from _changes_of_blend(before, after)
        elif before != after:
            yield Change(path, _plain(before), _plain(after), path in marked)


def _changes_of_blend(old: Sequence[BlendEntryConfig], new: Sequence[BlendEntryConfig]) -> Iterator[Change]:
    """A change if the sources differ. They are recognized by name, so their order decides nothing."""
    before, after = _sorted_blend(old), _sorted_blend(new)
    if before != after:
        yield Change("data.blend", before, after, False)


def _sorted_blend(entries: Sequence[BlendEntryConfig]) -> list[dict[str, Any]]:
    values = [
        each.model_dump(mode="json", exclude_defaults=True)
        | ({"blend": _sorted_blend(each.blend)} if each.blend else {})
        for each in entries
    ]
    return sorted(values, key=lambda value: json.dumps(value, sort_keys=True))


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json", exclude_defaults=True) if isinstance(value, Section) else value
