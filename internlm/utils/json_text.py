"""JSON that people or other programs wrote."""

from __future__ import annotations

import json
from typing import Any


def json_object(text: str | bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: it is anything else, or nested more deeply than Python reads.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("too many brackets inside each other") from None
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object is wanted, this is {type(value).__name__}")
    return value
