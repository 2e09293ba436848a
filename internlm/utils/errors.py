"""Mistakes that a user can mend.

Every entry point prints these without a traceback and exits with code 2. The message names the thing, its place
(file, key path, document, rank ...) and the fix. A defect of ours is never one of these: it keeps its traceback.
"""

from __future__ import annotations

import difflib
import os
import re
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


def user_message(error: BaseException) -> str | None:
    """What to tell the user of an error; None for a defect of ours, which keeps its traceback.

    Besides `UserError` these are a file or folder, named in the error, that the operating system refuses, and a model
    or a batch for which the host has too little memory.
    """
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
        return f"{name}: {error.strerror}"
    if isinstance(error, MemoryError) or "DefaultCPUAllocator: " in str(error):
        asked = re.search(r"allocate (\d+) bytes", str(error))
        amount = f" for another {int(asked[1]):,} bytes" if asked else ""
        return f"this machine lacks memory{amount}: take a smaller model or batch, or spread it over more ranks"
    return None


def nearest(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the known name closest to `name`, or an empty string when none is close."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{match[0]}'?" if match else ""
