"""Messages whose content is a list of parts, some of which are pictures, as Hugging Face's chat datasets have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def with_image_markers(row: Any, marker: str) -> Any:
    """A row with a part of text, `marker`, in place of each part {"type": "image"} of its messages."""
    if not isinstance(row, Mapping):
        return row
    return {
        name: [_with_marker(each, marker) for each in value] if isinstance(value, list) else value
        for name, value in row.items()
    }


def _with_marker(message: Any, marker: str) -> Any:
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), list):
        return message
    parts = [
        {"type": "text", "text": marker} if isinstance(part, Mapping) and part.get("type") == "image" else part
        for part in message["content"]
    ]
    return {**message, "content": parts}
