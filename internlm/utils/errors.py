"""Mistakes that a user can mend.

Every entry point prints these without a traceback and exits with code 2. The message names the thing, its place
(file, key path, document, rank ...) and the fix. A defect of ours is never one of these: it keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Base of all mistakes that a user can mend."""


class ConfigError(UserError):
    """The configuration is wrong. Collects every mistake found, so that a user mends them in one go."""

    def __init__(self, mistakes: str | Iterable[str]) -> None:
        self.mistakes = [mistakes] if isinstance(mistakes, str) else list(mistakes)
        super().__init__("\n".join(self.mistakes))


class DataError(UserError):
    """Training or evaluation data is missing, truncated or malformed."""


class TrainingError(UserError):
    """A run that learns nothing: every update is skipped, or no token has a label."""


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete, or does not fit the model."""


class StorageError(UserError, OSError):
    """A file cannot be read or written: the disk or the store is full, refuses, or is out of reach."""


class MissingFileError(StorageError, FileNotFoundError):
    """A file, folder or bucket that is to be read does not exist."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the known name closest to `name`, or an empty string when none is close."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{match[0]}'?" if match else ""
