"""The local image of a folder in an object store: names, sizes and small files, without the content of large ones.

A mirror has a tree of all files. Small ones and those that an index needs are there; a large one is a sparse file of
the same size, so finding files, their types and their sizes works as in a local folder. Its modification time stands
for its version in the store, so a cached index of another version is not used. Owns the tree and the listing;
`fetching.py` gets the content.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from internlm.data.remote.transfer import disk_error, download
from internlm.utils.errors import RemoteDataError, StorageError
from internlm.utils.file_lock import locked, remove_unused
from internlm.utils.logging import get_logger
from internlm.utils.place_names import name_place
from internlm.utils.storage import StoragePath, StoredFile, storage_path
from internlm.utils.user_cache import user_cache

MIRROR_SUFFIX = ".internlm-mirror"
_COMPANIONS = (".meta", ".idx", ".index", ".metadata", ".tokenizer.json", "README.md")
_COMPANION_NAMES = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_SMALL_BYTES = 64 * 1024
_NUM_DOWNLOADS = 8
_LISTING = "listing.json"

logger = get_logger(__name__)


@dataclass(frozen=True)
class DataCache:
    """Where files of object stores are kept.

    Attributes:
        folder: shared by the processes of a machine, also of several runs; None: `remote` in the user's cache.
        max_bytes: bound on the large files in it; None: no bound.
    """

    folder: Path | None = None
    max_bytes: int | None = None

    @property
    def path(self) -> Path:
        """The folder."""
        return user_cache() / "remote" if self.folder is None else self.folder


@dataclass(frozen=True)
class Mirror:
    """A mirror on the disk.

    Attributes:
        path: its folder.
        url: of the folder in the object store.
        max_bytes: bound on the large files of all mirrors beside this one.
        files: by name relative to the folder.
    """

    path: Path
    url: str
    max_bytes: int | None
    files: dict[str, StoredFile]

    @property
    def tree(self) -> Path:
        """The folder of all files, with the name that it has in the store."""
        return self.path / "tree" / _label(self.url)

    def url_of(self, name: str) -> StoragePath:
        """The URL of a file."""
        return storage_path(self.url) / name

    def content(self, name: str) -> Path:
        """Where the content of a large file is once it has been fetched, in the present version."""
        return self.path / "content" / version_hash(self.files[name]) / name


def is_remote(folder: str | Path) -> bool:
    """Whether a folder of data is the URL of an object store."""
    return "://" in str(folder)


def local_folder(folder: str | Path, cache: DataCache | None = None) -> str | Path:
    """The folder itself or, for a URL, its mirror, brought up to date.

    Args:
        folder: a local folder or file; or the URL of a folder, of a file, or of a file without its suffix.
        cache: None: the default one.

    Raises:
        RemoteDataError: there is no such bucket or folder, access is denied, the store cannot be reached, or the local
            disk is full.
        ConfigError: the URL is malformed, or the package for it is not installed.
    """
    return mirror_folder(str(folder), cache or DataCache()) if is_remote(folder) else folder


def mirror_folder(url: str, cache: DataCache) -> Path:
    """List a folder of an object store, and update its mirror; see `local_folder`."""
    url = storage_path(url).url
    try:
        root, files, single = _list(url)
    except StorageError as error:
        raise RemoteDataError(str(error)) from error
    _check(files, root, cache)
    path = cache.path / f"{_readable(url)}-{hashlib.sha256(url.encode()).hexdigest()[:16]}{MIRROR_SUFFIX}"
    mirror = Mirror(path, root.url, cache.max_bytes, files)
    _name_copies(mirror)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with locked(path / "lock", f"lists {url}"):
            _update(mirror)
    except StorageError as error:
        raise RemoteDataError(str(error)) from error
    except OSError as error:
        raise disk_error(url, cache.path, error) from error
    return mirror.tree / single


def read_mirror(path: Path) -> Mirror | None:
    """The mirror in a folder; None if there is none."""
    try:
        status = (path / _LISTING).stat()
    except OSError:
        return None
    return _parse(path, status.st_mtime_ns, status.st_size)


def listing_digest(folder: Path) -> str:
    """A digest of all names and versions of the mirror that a folder or file is in."""
    path = next(each for each in (folder, *folder.parents) if each.name.endswith(MIRROR_SUFFIX))
    mirror = read_mirror(path)
    assert mirror is not None
    return hashlib.sha256("".join(map(version_hash, mirror.files.values())).encode()).hexdigest()[:16]


def is_companion(file: StoredFile) -> bool:
    """Whether a file is small or needed before any document is read, so that the tree has it."""
    name = PurePosixPath(file.name).name
    return file.size <= _SMALL_BYTES or name.endswith(_COMPANIONS) or name in _COMPANION_NAMES


def version_hash(file: StoredFile) -> str:
    """Part of the name of everything that belongs to one version of a file."""
    return hashlib.sha256(f"{file.name} {file.size} {file.version}".encode()).hexdigest()[:16]


@functools.lru_cache(maxsize=64)
def _parse(path: Path, mtime_ns: int, size: int) -> Mirror:
    values = json.loads((path / _LISTING).read_text(encoding="utf-8"))
    files = {name: StoredFile(name, size, version) for name, (size, version) in values["files"].items()}
    mirror = Mirror(path, values["url"], values["max_bytes"], files)
    _name_copies(mirror)
    return mirror


def _name_copies(mirror: Mirror) -> None:
    """Let messages show URLs in place of paths in the mirror."""
    for path in {mirror.path, mirror.path.resolve()}:
        copies = f"(?:tree/{re.escape(mirror.tree.name)}|content/[0-9a-f]{{16}})"
        name_place(f"{re.escape(str(path))}/{copies}", mirror.url)


def _list(url: str) -> tuple[StoragePath, dict[str, StoredFile], str]:
    """(folder, its files, name of the file to read in it or '').

    Raises:
        RemoteDataError: there is nothing.
        StorageError: the store refuses, or cannot be reached.
    """
    path = storage_path(url)
    files = path.files()
    if files:
        return path, {file.name: file for file in files}, ""
    name, parent = path.name, path.parent
    if name:
        # One file, or one without its suffix, with what belongs to it.
        stem = name if name in (names := parent.names()) and "." not in name else name.rpartition(".")[0] or name
        related = [each for each in names if each == name or each.startswith((f"{stem}.", f"{name}."))]
        stored = {each: StoredFile(each, (parent / each).size(), (parent / each).version()) for each in related}
        if stored:
            return parent, stored, name
    raise RemoteDataError(f"{url}: no file there; check the spelling of the URL")


def _check(files: dict[str, StoredFile], root: StoragePath, cache: DataCache) -> None:
    """Check that a local folder can have the files.

    Raises:
        RemoteDataError: a name is not possible, or a file is larger than the cache.
    """
    folders = {str(parent) for name in files for parent in PurePosixPath(name).parents}
    for name, file in files.items():
        parts = name.split("/")
        if name in folders or any(part in ("", ".", "..") for part in parts) or "\0" in name:
            raise RemoteDataError(
                f"{root}: the object '{name}' cannot be a file below a folder: a part of its name is empty or dots, or "
                "other objects have it as their folder. Rename it, or give the URL of a subfolder"
            )
        if cache.max_bytes is not None and file.size > cache.max_bytes and not is_companion(file):
            raise RemoteDataError(
                f"{root / name}: {file.size:,} bytes, more than data.cache_bytes = {cache.max_bytes:,}, and a file is "
                "fetched whole; raise data.cache_bytes, or split the file"
            )


def _update(mirror: Mirror) -> None:
    """Make the tree that of the listing; the process holds the lock of the mirror."""
    old = read_mirror(mirror.path)
    missing = [file for file in mirror.files.values() if not _is_current(mirror, file)]
    if old is not None and (old.url, old.max_bytes, old.files) == (mirror.url, mirror.max_bytes, mirror.files):
        if not missing:
            return
    elif old is not None:
        for name, file in old.files.items():
            if name not in mirror.files:
                (mirror.tree / name).unlink(missing_ok=True)
            if mirror.files.get(name) != file:
                remove_unused(old.content(name))
    with ThreadPoolExecutor(_NUM_DOWNLOADS) as downloads:
        waiting = [downloads.submit(_make, mirror, file) for file in missing]
        try:
            for each in waiting:
                each.result()
        finally:
            for each in waiting:
                each.cancel()
    values = {name: (file.size, file.version) for name, file in mirror.files.items()}
    listing = {"url": mirror.url, "max_bytes": mirror.max_bytes, "files": values}
    with _replacing(mirror.path / _LISTING) as temporary:
        temporary.write_text(json.dumps(listing), encoding="utf-8")
    large = [file.size for file in mirror.files.values() if not is_companion(file)]
    bound = "without a bound" if mirror.max_bytes is None else f"up to data.cache_bytes = {mirror.max_bytes:,}"
    logger.info(
        "%s: %s files, of which %s with %s bytes are fetched when they are needed, %s, to %s",
        mirror.url, f"{len(mirror.files):,}", f"{len(large):,}", f"{sum(large):,}", bound, mirror.path,
    )  # fmt: skip


def _make(mirror: Mirror, file: StoredFile) -> None:
    """Make a file of the tree."""
    with _replacing(mirror.tree / file.name) as temporary:
        with open(temporary, "wb") as target:
            if is_companion(file):
                download(mirror.url_of(file.name), file, target)
            else:
                target.truncate(file.size)
        os.utime(temporary, ns=(_mtime_ns(file), _mtime_ns(file)))


def _is_current(mirror: Mirror, file: StoredFile) -> bool:
    try:
        status = (mirror.tree / file.name).stat()
    except OSError:
        return False
    return (status.st_size, status.st_mtime_ns) == (file.size, _mtime_ns(file))


def _mtime_ns(file: StoredFile) -> int:
    """A time that stands for the version: whole seconds, which every file system can store."""
    return int(version_hash(file)[:7], 16) * 2 * 10**9


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file that becomes `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _label(url: str) -> str:
    """The name of the folder in the store; of a whole bucket, that of the bucket."""
    return storage_path(url).name or re.sub(r"[^\w.-]", "-", url.rpartition("//")[2]) or "data"


def _readable(url: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "-", url).strip("-.")[-60:]
