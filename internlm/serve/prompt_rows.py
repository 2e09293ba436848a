"""Prompts in a file of JSON lines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internlm.utils.errors import DataError
from internlm.utils.json_text import json_lines


@dataclass(frozen=True)
class PromptRow:
    """A prompt, and what its line says besides it.

    Attributes:
        prompt: text, or token ids.
        fields: all fields of the line.
        place: file and line, or the option that gave it, for messages.
    """

    prompt: str | list[int]
    fields: Mapping[str, Any]
    place: str


def read_prompt_rows(path: Path) -> list[PromptRow]:
    """Read objects with a field "prompt", a text or a list of token ids, one on each line.

    Raises:
        DataError: the file cannot be read, has no line, or a line is something else.
    """
    rows = []
    for place, fields in json_lines(path, "prompt"):
        prompt = fields.get("prompt")
        is_ids = isinstance(prompt, list) and all(type(id) is int for id in prompt) and bool(prompt)
        if prompt is None or not (isinstance(prompt, str) or is_ids):
            raise DataError(f'{place}: must be an object with "prompt", a text or a list of token ids')
        if "completions" in fields:
            raise DataError(f'{place}: has "completions" already, which would be overwritten; rename the field')
        rows.append(PromptRow(prompt, fields, place))
    return rows
