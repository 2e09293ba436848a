"""Downloads the content of an object, and names what prevents it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import IO

from internlm.utils.errors import MissingFileError, RemoteDataError, ReplacedFileError, StorageError
from internlm.utils.storage import StoragePath, StoredFile

_CHUNK_BYTES = 32 * 1024**2
"""Read at once, by several requests in parallel."""


def download(path: StoragePath, file: StoredFile, target: IO[bytes], start: int = 0, stop: int | None = None) -> None:
    """Write the bytes [start, stop) of an object.

    Lost connections are waited out by the retry policy of the storage.

    Raises:
        RemoteDataError: the object is gone or replaced, access is denied, or the store cannot be reached.
        OSError: the local disk is full or fails.
    """
    stop = file.size if stop is None else min(stop, file.size)
    buffer = memoryview(bytearray(min(_CHUNK_BYTES, max(stop - start, 0))))
    try:
        source = path.open_unbuffered(file.version)
    except MissingFileError as error:
        raise RemoteDataError(
            f"{path}: gone since the run listed its folder. Restore it, or start the run again without it"
        ) from error
    except ReplacedFileError as error:
        raise RemoteDataError(
            f"{path}: replaced since the run listed its folder, so its samples have other numbers. Restore it, or "
            "start the run again with the new version"
        ) from error
    except StorageError as error:
        raise RemoteDataError(str(error)) from error
    with source:
        source.seek(start)
        while start < stop:
            try:
                count = source.readinto(buffer[: stop - start])
            except StorageError as error:
                raise RemoteDataError(str(error)) from error
            if not count:
                break
            target.write(buffer[:count])
            start += count


def disk_error(url: str, folder: Path, error: OSError) -> RemoteDataError:
    """The error for a local disk that does not take a file."""
    place = next((each for each in (folder, *folder.parents) if each.is_dir()), Path("/"))
    return RemoteDataError(
        f"{url}: cannot be written to {folder}, whose disk has {shutil.disk_usage(place).free:,} bytes free: "
        f"{error.strerror or error}. Set data.cache_folder to a folder with space, or data.cache_bytes to less than it"
    )
