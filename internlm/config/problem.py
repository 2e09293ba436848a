"""One problem of a configuration, before it is located in a file."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One user error in a configuration."""

    keys: tuple[str, ...]
    """Dotted paths of the keys involved, the one to change first."""
    text: str
    """What is wrong and how to fix it; names the key and its value."""
