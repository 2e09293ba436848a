"""A copy of a file in the user's cache that has byte offsets: a compressed file decompressed, a JSON array as lines.

Owns where copies are.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import BinaryIO

from internlm.data.remote.local_file import local_file
from internlm.data.rows.file_version import FileVersion, check_version
from internlm.data.tokenize.input_files import is_compressed, open_input
from internlm.data.tokenize.json_values import iterate_json_array
from internlm.utils.errors import DataError
from internlm.utils.file_lock import locked_if_possible
from internlm.utils.logging import get_logger
from internlm.utils.user_cache import user_cache

_COPY_BYTES = 1 << 20

logger = get_logger(__name__)


def text_copy(path: Path, version: FileVersion, *, is_array: bool) -> Path:
    """The copy of a file, made if it is not there.

    Args:
        path: a compressed text or JSON lines file, or a file with a JSON array.
        version: it must have.
        is_array: whether it has a JSON array, whose elements become lines.

    Raises:
        DataError: the file is damaged or another version, or the cache has no space.
    """
    key = repr((str(path.resolve()), version.size, version.mtime_ns, is_array)).encode()
    folder = user_cache() / "text_copies"
    copy = folder / f"{hashlib.sha256(key).hexdigest()[:16]}-{path.name}.{'jsonl' if is_array else 'txt'}"
    if copy.is_file():
        return copy
    check_version(path, version)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked_if_possible(folder / f".{copy.name}.lock", f"decompresses {path}"):
            if not copy.is_file():
                _make(path, copy, is_array)
    except OSError as error:
        free = shutil.disk_usage(folder).free if folder.is_dir() else 0
        raise DataError(
            f"{path}: cannot be written decompressed to {folder}, which has {free:,} bytes free: "
            f"{error.strerror or error}. Set XDG_CACHE_HOME to a folder with space, or decompress the file yourself"
        ) from error
    return copy


def _make(path: Path, copy: Path, is_array: bool) -> None:
    temporary = copy.with_name(f".{copy.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as target, local_file(path) as content:
            if is_array:
                _write_lines(content, target)
            else:
                with open_input(content) as source:
                    shutil.copyfileobj(source, target, _COPY_BYTES)
        os.replace(temporary, copy)
    finally:
        temporary.unlink(missing_ok=True)
    what = "JSON array as lines" if is_array and not is_compressed(path) else "decompressed"
    logger.info(
        "%s: rows need byte offsets: %s once to %s (%s bytes, from %s); it may be deleted between runs",
        path, what, copy, f"{copy.stat().st_size:,}", f"{path.stat().st_size:,}",
    )  # fmt: skip


def _write_lines(path: Path, target: BinaryIO) -> None:
    for value in iterate_json_array(path):
        target.write(json.dumps(value).encode() + b"\n")
