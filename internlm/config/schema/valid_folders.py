"""The forms of `data.valid_folder`: one folder, or a dict of named validation sets."""

from __future__ import annotations

from typing import Any

from pydantic import BeforeValidator, ValidationError

from internlm.config.schema.conversations import ConversationConfig
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
    "content_name": (str, "the column with the text"),
    "subset_name": (str, "a subset of the dataset"),
    "text_unit": (str, "'line', 'paragraph' or 'file'"),
    "add_bos": (bool, "True or False"),
    "add_eos": (bool, "True or False"),
    "conversations": (dict, "a dict as data.conversations, or None"),
    "image_folder": (str, "a folder"),
    "image_column": (str, "the column with the pictures"),
}
_CHOICES = {
    "type": VALID_TYPES,
    "array_dtype": ("uint16", "uint32"),
    "text_unit": ("line", "paragraph", "file"),
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
            if not _is_valid(item, inner):
                raise ValueError(f"{place}{item} = {inner!r} must be {_KEYS[item][1]})")
        try:
            result[name] = entry | {"path": expand_home(entry["path"])}
        except ConfigError as error:
            raise ValueError(f"{place}a path that can be found: {error})") from error
    return result


def _is_valid(item: str, value: Any) -> bool:
    if item == "conversations":
        try:
            return value is None or bool(ConversationConfig.model_validate(value))
        except ValidationError:
            return False
    kind, _ = _KEYS[item]
    if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool) or value == "":
        return False
    if isinstance(value, int) and value < 0:
        return False
    return item not in _CHOICES or value in _CHOICES[item]


VALID_FOLDERS = BeforeValidator(_named_sets)
