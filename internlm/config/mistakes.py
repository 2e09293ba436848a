"""A mistake in a configuration, before it is known where its keys were set."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mistake:
    """One thing to mend."""

    keys: tuple[str, ...]
    """Dotted paths of the keys involved, the one to mend first."""
    text: str
    """What is wrong and how to mend it; names the key and its value."""
