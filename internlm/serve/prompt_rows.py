"""Prompts in a file of JSON lines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internlm.utils.errors import DataError


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
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompts {path}: cannot be read: {error}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise DataError(f"{place}: not JSON: {error}") from error
        prompt = fields.get("prompt") if isinstance(fields, dict) else None
        is_ids = isinstance(prompt, list) and all(type(id) is int for id in prompt) and bool(prompt)
        if prompt is None or not (isinstance(prompt, str) or is_ids):
            raise DataError(f'{place}: must be an object with "prompt", a text or a list of token ids')
        if "completions" in fields:
            raise DataError(f'{place}: has "completions" already, which would be overwritten; rename the field')
        rows.append(PromptRow(prompt, fields, place))
    if not rows:
        raise DataError(f"--prompts {path}: no prompt in this file")
    return rows
