"""The offset of each document in a file's shuffled concatenation; built once and cached on disk.

Owns the shuffle of the documents of one file, the `min_length` filter and the cache. The cache has a summary of each
file, so that a .meta is read only once, and the cumulative lengths, built at first use and memory-mapped. The names of
cache files depend on everything that their content depends on. Building takes bounded memory: `permute` stores nothing,
and the .meta is read in blocks. Ranks may build the same index concurrently: each writes a temporary file and renames
it.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from internlm.data.permutation import permute
from internlm.data.tokenized_files.reader import TokenizedFile
from internlm.data.tokenized_files.writer import meta_path
from internlm.utils.errors import DataError
from internlm.utils.user_cache import user_cache

CACHE_FOLDER = ".index_cache"
DOCUMENT_SEED = 1024
"""Seed of the shuffle within a file. It does not depend on the seed of the run, so all runs share one cache."""
_FORMAT_VERSION = 1
_BLOCK = 1 << 20


@dataclass(frozen=True)
class FileSummary:
    """Counts from the .meta of a file.

    Attributes:
        documents: number of documents in the file.
        kept_documents: number of documents with at least max(1, min_length) tokens.
        kept_tokens: tokens of these documents.
    """

    documents: int
    kept_documents: int
    kept_tokens: int


def summarize(path: Path, min_length: int) -> FileSummary:
    """Count the documents and tokens of a file, and check that the .meta points into the .bin.

    Raises:
        DataError: see `TokenizedFile`.
    """
    cached = _cached(path, f"summary-{min_length}", ".json")
    if cached is not None:
        return FileSummary(**json.loads(cached.read_text()))
    file = TokenizedFile(path)
    kept_documents = kept_tokens = 0
    for start in range(0, len(file), _BLOCK):
        stop = min(start + _BLOCK, len(file))
        file.check_offsets(start, stop)
        counts = file.counts(start, stop)
        counts = counts[counts >= max(1, min_length)]
        kept_documents += len(counts)
        kept_tokens += int(counts.sum())
    summary = FileSummary(len(file), kept_documents, kept_tokens)
    _store(path, f"summary-{min_length}", ".json", lambda target: target.write_text(json.dumps(asdict(summary))))
    return summary


class DocumentIndex:
    """Maps positions in the shuffled concatenation of a file to documents.

    Args:
        file: the tokenized file.
        min_length: minimum number of tokens; shorter documents are dropped.
        count_documents: whether positions count documents instead of tokens.
    """

    def __init__(self, file: TokenizedFile, min_length: int, count_documents: bool = False) -> None:
        self._num_documents = len(file)
        self._ends = _cumulative_lengths(file, min_length, count_documents)

    def locate(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Find the documents that cover the positions [start, stop), start < stop.

        Returns:
            (documents, starts), both int64 [n]: the index of each document in the file, and the position of its first
            token, which may be before `start` for the first document.
        """
        first = int(np.searchsorted(self._ends, start, side="right"))
        last = int(np.searchsorted(self._ends, stop, side="left"))
        shuffled = np.arange(first, last + 1, dtype=np.int64)
        ends = np.asarray(self._ends[first : last + 1], dtype=np.int64)
        starts = np.concatenate(([int(self._ends[first - 1]) if first else 0], ends[:-1]))
        present = ends > starts
        documents = permute(shuffled[present], self._num_documents, DOCUMENT_SEED)
        return documents, starts[present].astype(np.int64)


def _cumulative_lengths(file: TokenizedFile, min_length: int, count_documents: bool) -> NDArray[np.int64]:
    """End position of every document in shuffled order, dropped ones with length 0: int64 [documents]."""
    kind = f"{'documents' if count_documents else 'tokens'}-{min_length}-{DOCUMENT_SEED}"
    cached = _cached(file.path, kind, ".npy")
    if cached is None:
        cached = _store(
            file.path, kind, ".npy", lambda target: _write_cumulative_lengths(target, file, min_length, count_documents)
        )
    return np.load(cached, mmap_mode="r")


def _write_cumulative_lengths(target: Path, file: TokenizedFile, min_length: int, count_documents: bool) -> None:
    ends = np.lib.format.open_memmap(target, mode="w+", dtype=np.int64, shape=(len(file),))
    total = 0
    for start in range(0, len(file), _BLOCK):
        stop = min(start + _BLOCK, len(file))
        counts = file.counts_of(permute(np.arange(start, stop), len(file), DOCUMENT_SEED))
        selected = counts >= max(1, min_length)
        ends[start:stop] = total + np.cumsum(selected if count_documents else np.where(selected, counts, 0))
        total = int(ends[stop - 1])
    ends.flush()


def _cache_name(path: Path, kind: str, suffix: str) -> str:
    parts: list[object] = [_FORMAT_VERSION, kind, path.name]
    for each in (path, meta_path(path)):
        status = each.stat()
        parts += [status.st_size, status.st_mtime_ns]
    return f"{path.stem}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}-{kind}{suffix}"


def _cache_folders(path: Path) -> list[Path]:
    """The cache folder beside the data, and the one in the user's cache for data on a read-only disk."""
    folder_hash = hashlib.sha256(str(path.parent.resolve()).encode()).hexdigest()[:16]
    return [path.parent / CACHE_FOLDER, user_cache() / "index" / folder_hash]


def _cached(path: Path, kind: str, suffix: str) -> Path | None:
    if not path.is_file() or not meta_path(path).is_file():
        return None
    name = _cache_name(path, kind, suffix)
    candidates = (folder / name for folder in _cache_folders(path))
    return next((file for file in candidates if file.is_file() and os.access(file, os.R_OK)), None)


def _store(path: Path, kind: str, suffix: str, write: Callable[[Path], object]) -> Path:
    name = _cache_name(path, kind, suffix)
    failures = []
    for folder in _cache_folders(path):
        # Not tempfile, whose files only their owner can read: data is shared between users.
        temporary = folder / f".tmp-{os.getpid()}-{secrets.token_hex(8)}{suffix}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write(temporary)
            os.replace(temporary, folder / name)
            return folder / name
        except OSError as error:
            failures.append(str(error))
            if folder.is_dir():
                temporary.unlink(missing_ok=True)
    raise DataError(
        f"{path}: the index can be written neither beside the file nor in the user's cache ({'; '.join(failures)}). "
        "Set XDG_CACHE_HOME to a writable folder"
    )
