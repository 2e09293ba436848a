"""A loaded configuration as text, for `--print-config`."""

from __future__ import annotations

from internlm.config.loader import LoadedConfig
from internlm.config.schema.base import walk_values


def format_config(loaded: LoadedConfig) -> str:
    """One line per key: `path = value  # origin`, in the order of the schema; then the notices."""
    values = {path: repr(value) for path, _, value in walk_values(loaded.config)}
    keys = max(len(path) for path in values)
    column = max(len(text) for text in values.values() if len(text) <= 40)
    lines = [f"{path:<{keys}} = {text:<{column}}  # {loaded.origins[path]}" for path, text in values.items()]
    return "\n".join([*lines, *(f"# notice: {notice}" for notice in loaded.notices)])
