"""Names that messages show for places that the user has not written, such as the local copy of a remote folder."""

from __future__ import annotations

import re

_names: dict[str, str] = {}
_compiled: list[tuple[re.Pattern[str], str]] = []


def name_place(pattern: str, name: str) -> None:
    """Let the messages of this process show a name in the place of a path.

    Args:
        pattern: regular expression of the path, which ends at the border of a path component.
        name: to show.
    """
    if _names.get(pattern) != name:
        _names[pattern] = name
        _compiled[:] = [(re.compile(f"(?:{each})(?![\\w-]|\\.\\w)"), shown) for each, shown in _names.items()]


def with_place_names(message: str) -> str:
    """A message with the names of the places in it."""
    for pattern, name in _compiled:
        message = pattern.sub(name.replace("\\", r"\\"), message)
    return message
