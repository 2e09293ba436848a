"""Parsing of JSON that users or other programs wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from internlm.utils.errors import DataError


def json_object(text: str | bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        ValueError: the text is anything else, or nested too deeply for Python's parser.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("too many nested brackets") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    return value


def check_text(value: Any) -> None:
    r"""Refuse a JSON value with half of a surrogate pair (``"\ud800"``), which no encoding of text has.

    Raises:
        ValueError: a text or a key has one.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half of a surrogate pair, \\u{ord(error.object[error.start]):04x}, is no text") from None
    except RecursionError:
        raise ValueError("too many nested brackets") from None


def json_lines(path: Path, what: str) -> list[tuple[str, dict[str, Any]]]:
    """Read a file with a JSON object on each line; empty lines are left out, and so is a byte order mark.

    Args:
        path: the file.
        what: what a line is, for messages.

    Returns:
        The place of each object, for messages, and the object.

    Raises:
        DataError: the file cannot be read or has no object, or a line is something else.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            fields = json_object(line)
            check_text(fields)
        except ValueError as error:
            raise DataError(f"{place}: not a {what}: {error}") from error
        found.append((place, fields))
    if not found:
        raise DataError(f"{path}: no {what} in this file")
    return found
