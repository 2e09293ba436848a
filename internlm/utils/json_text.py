"""Parsing of JSON that users or other programs wrote."""

from __future__ import annotations

import json
from typing import Any


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
