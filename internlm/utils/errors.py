"""User errors.

Every entry point prints them without a traceback and exits with code 2. The message names the thing, its place (file,
key path, document, rank ...) and the fix. A defect of this project is never a user error and keeps its traceback.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable

from internlm.utils.place_names import with_place_names


class UserError(Exception):
    """Base class of all user errors."""


class ConfigError(UserError):
    """The configuration is invalid.

    Attributes:
        mistakes: one text for each problem found, so that a user can fix all of them at once.
    """

    def __init__(self, mistakes: str | Iterable[str]) -> None:
        self.mistakes = [mistakes] if isinstance(mistakes, str) else list(mistakes)
        super().__init__("\n".join(self.mistakes))


class DataError(UserError):
    """Training or evaluation data is missing, truncated or malformed.

    Where the message has the path of a local copy of data, it names what the copy is of; see `name_place`.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(with_place_names(each) if isinstance(each, str) else each for each in args))


class RemoteDataError(DataError):
    """Data in an object store cannot be fetched: it is unreachable, gone or replaced, or the local disk is full."""


class TrainingError(UserError):
    """The run learns nothing: every update is skipped, or no token has a label."""


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete, or does not fit the model."""


class StorageError(UserError, OSError):
    """A file cannot be read or written: its disk or store is full, denies access, or is unreachable."""


class MissingFileError(StorageError, FileNotFoundError):
    """A file, folder or bucket to read does not exist."""


class ReplacedFileError(StorageError):
    """A file to read is not the version that was asked for."""


def user_message(error: BaseException) -> str | None:
    """The message to show for an error; None for a defect of this project, which keeps its traceback.

    Besides a `UserError`, an OSError that names a file and a failed allocation of host memory have one.
    """
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
        return with_place_names(f"{name}: {error.strerror}")
    if isinstance(error, MemoryError) or "DefaultCPUAllocator: " in str(error):
        requested = re.search(r"allocate (\d+) bytes", str(error))
        amount = f" for another {int(requested[1]):,} bytes" if requested else ""
        return f"this machine is out of memory{amount}: use a smaller model or batch, or more ranks on more machines"
    return None


def nearest(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the known name closest to `name`, or an empty string when none is close."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{match[0]}'?" if match else ""
