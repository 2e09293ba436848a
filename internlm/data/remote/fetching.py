"""Fetches the large files of a mirror, whole, and bounds what all mirrors of a cache take.

A file is downloaded to a partial one, which a killed process leaves for the next to continue, and renamed when it is
complete. The processes of a machine share all files: one fetches while the others wait. The least recently opened files
are removed for new ones, never one that a process has open.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from internlm.data.remote.mirror import MIRROR_SUFFIX, Mirror, version_hash
from internlm.data.remote.transfer import disk_error, download
from internlm.utils.errors import RemoteDataError
from internlm.utils.file_lock import locked, remove_unused
from internlm.utils.logging import get_logger

logger = get_logger(__name__)

_PARTIAL = "partial"
_warned: set[Path] = set()
"""Cache folders whose bound this process has had to exceed."""


def fetch(mirror: Mirror, name: str) -> Path:
    """Get the content of a large file, unless it is there or another process gets it.

    Returns:
        Its path; the file may be removed before it is opened.

    Raises:
        RemoteDataError: it cannot be fetched.
    """
    content, file, url = mirror.content(name), mirror.files[name], mirror.url_of(name)
    partial = mirror.path / _PARTIAL / f"{version_hash(file)}.{file.size}"
    try:
        for folder in (content.parent, partial.parent, mirror.path / "locks"):
            folder.mkdir(parents=True, exist_ok=True)
        # Not the lock of the file itself, which its readers hold once it is there.
        lock = mirror.path / "locks" / partial.stem
        with locked(lock, f"fetches {url}"):
            if not content.is_file():
                with locked(partial, "is removed") as descriptor:
                    if mirror.max_bytes is not None:
                        _make_room(mirror.path.parent, mirror.max_bytes, partial)
                    _resume(mirror, name, descriptor)
                    os.replace(partial, content)
            lock.unlink(missing_ok=True)
    except RemoteDataError:
        raise
    except OSError as error:
        raise disk_error(str(url), mirror.path, error) from error
    return content


def _resume(mirror: Mirror, name: str, descriptor: int) -> None:
    """Download what a partial file lacks."""
    file, url = mirror.files[name], mirror.url_of(name)
    start, began = os.fstat(descriptor).st_size, time.monotonic()
    if start:
        logger.info("%s: continues an interrupted download at byte %s", url, f"{start:,}")
    with open(descriptor, "ab", closefd=False) as target:
        download(url, file, target, start)
    size = os.fstat(descriptor).st_size
    if size != file.size:
        os.truncate(descriptor, 0)
        raise RemoteDataError(f"{url}: {size:,} bytes arrived, the store listed {file.size:,}; start the run again")
    # A renamed file must be complete after a failure of power, too.
    os.fsync(descriptor)
    logger.debug("%s: fetched %s bytes in %.1f s", url, f"{size - start:,}", time.monotonic() - began)


def _make_room(cache: Path, max_bytes: int, partial: Path) -> None:
    """Remove files until a partial one, to which this process has the lock, fits."""
    with locked(cache / "lock", "makes room in the cache"):
        partials = {path: int(path.suffix[1:]) for path in _files(cache, _PARTIAL)}
        contents = []
        for path in _files(cache, "content"):
            status = path.stat()
            contents.append((status.st_mtime_ns, path, status.st_size))
        excess = sum(partials.values()) + sum(size for *_, size in contents) - max_bytes
        # Downloads that nobody continues go first.
        abandoned = [(path, size) for path, size in partials.items() if path != partial]
        for path, size in [*abandoned, *((path, size) for _, path, size in sorted(contents))]:
            if excess <= 0:
                return
            if remove_unused(path):
                excess -= size
    if excess > 0 and cache not in _warned:
        _warned.add(cache)
        logger.warning(
            "%s: %s bytes more than data.cache_bytes = %s, because all other files are in use; raise data.cache_bytes, "
            "or use smaller files or fewer data workers",
            cache, f"{excess:,}", f"{max_bytes:,}",
        )  # fmt: skip


def _files(cache: Path, kind: str) -> Iterator[Path]:
    """The partial files, or the contents, of all mirrors of a cache."""
    for mirror in cache.glob(f"*{MIRROR_SUFFIX}"):
        for place, _, names in os.walk(mirror / kind):
            yield from (Path(place, name) for name in names)
