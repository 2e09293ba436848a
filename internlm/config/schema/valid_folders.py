"""The forms of `data.valid_folder`: one folder, or a dict of named validation sets."""

from __future__ import annotations

from typing import Any

from pydantic import BeforeValidator

from internlm.utils.errors import ConfigError
from internlm.utils.paths import expand_home

DOCUMENT_TYPES = ("tokenized", "megatron", "arrays")
"""Values of `data.type` whose files have documents by number."""

VALID_TYPES = (*DOCUMENT_TYPES, "streaming")
"""Types of validation sets."""

_KEYS: dict[str, tuple[type, str]] = {
    "path": (str, "a folder or file"),
    "type": (str, f"one of {', '.join(map(repr, VALID_TYPES))}"),
    "array_dtype": (str, "'uint16' or 'uint32'"),
    "array_separator": (int, "an id"),
}


def _named_sets(value: Any) -> Any:
    """Bring every set into the form dict(path=...).

    Raises:
        ValueError: describes what is expected instead.
    """
    if not isinstance(value, dict):
        return value
    if not value:
        raise ValueError("a folder, or a dict with at least one set")
    result = {}
    for name, given in value.items():
        place = f"a dict of sets (its entry {name!r}: "
        if not isinstance(name, str) or not name or name.startswith("/"):
            raise ValueError(f"{place}a name is a non-empty string that does not start with '/')")
        entry = {"path": given} if isinstance(given, str) else given
        if not isinstance(entry, dict) or "path" not in entry:
            raise ValueError(f"{place}expected a path, or dict(path=..., type=...))")
        for item, inner in entry.items():
            if item not in _KEYS:
                raise ValueError(f"{place}{item!r} is not one of {', '.join(_KEYS)})")
            kind, meaning = _KEYS[item]
            wrong = isinstance(inner, bool) or not isinstance(inner, kind) or inner == ""
            wrong = wrong or (item == "type" and inner not in VALID_TYPES)
            wrong = wrong or (item == "array_dtype" and inner not in ("uint16", "uint32"))
            if wrong or (item == "array_separator" and inner < 0):
                raise ValueError(f"{place}{item} = {inner!r} must be {meaning})")
        try:
            result[name] = entry | {"path": expand_home(entry["path"])}
        except ConfigError as error:
            raise ValueError(f"{place}a path that can be found: {error})") from error
    return result


VALID_FOLDERS = BeforeValidator(_named_sets)
