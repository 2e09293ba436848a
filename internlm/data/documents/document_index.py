"""The offset of each document in a file's shuffled concatenation; built once and cached on disk.

Owns the shuffle of the documents of one file and the `min_length` filter. Held-out documents are the last of the
shuffled order, so an index without them is the beginning of the cached one. The cache has a summary of each file, so
that its counts are read only once, and the cumulative lengths, built at first use and memory-mapped. Building takes
bounded memory: `permute` stores nothing, and counts are read in blocks.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from internlm.data.documents.document_file import DocumentFile
from internlm.data.documents.index_cache import cached_or_built, cached_or_built_array
from internlm.data.permutation import permute

DOCUMENT_SEED = 1024
"""Seed of the shuffle within a file. It does not depend on the seed of the run, so all runs share one cache."""
_BLOCK = 1 << 20


@dataclass(frozen=True)
class FileSummary:
    """Counts of the documents of a file.

    Attributes:
        documents: number of documents in the file.
        kept_documents: number of documents with at least max(1, min_length) tokens that are not held out.
        kept_tokens: tokens of these documents.
        longest: tokens of the longest document.
    """

    documents: int
    kept_documents: int
    kept_tokens: int
    longest: int


def summarize(file: DocumentFile, min_length: int, held_out: int = 0) -> FileSummary:
    """Count the documents and tokens of a file, and check that they are inside it.

    Args:
        file: a whole file, of any format.
        min_length: minimum number of tokens; shorter documents are dropped.
        held_out: number of documents at the end of the shuffled order that are not kept.

    Raises:
        DataError: a document is not inside the file.
    """
    stored = cached_or_built(
        file, f"summary-{min_length}", ".json", lambda target: _write_summary(target, file, min_length)
    )
    summary = FileSummary(**json.loads(stored.read_text()))
    if held_out:
        counts = file.counts_of(permute(np.arange(len(file) - held_out, len(file)), len(file), DOCUMENT_SEED))
        counts = counts[counts >= max(1, min_length)]
        summary = replace(
            summary,
            kept_documents=summary.kept_documents - len(counts),
            kept_tokens=summary.kept_tokens - int(counts.sum()),
        )
    return summary


def _write_summary(target: Path, file: DocumentFile, min_length: int) -> None:
    kept_documents = kept_tokens = longest = 0
    for start in range(0, len(file), _BLOCK):
        stop = min(start + _BLOCK, len(file))
        file.check_offsets(start, stop)
        counts = file.counts(start, stop)
        longest = max(longest, int(counts.max()))
        counts = counts[counts >= max(1, min_length)]
        kept_documents += len(counts)
        kept_tokens += int(counts.sum())
    target.write_text(json.dumps(asdict(FileSummary(len(file), kept_documents, kept_tokens, longest))))


class DocumentIndex:
    """Maps positions in the shuffled concatenation of a file to documents.

    Args:
        file: of any format.
        min_length: minimum number of tokens; shorter documents are dropped.
        count_documents: whether positions count documents instead of tokens.
        held_out: number of documents at the end of the shuffled order that have no position.
    """

    def __init__(self, file: DocumentFile, min_length: int, count_documents: bool = False, held_out: int = 0) -> None:
        self._num_documents = len(file)
        self._ends = _cumulative_lengths(file, min_length, count_documents)[: len(file) - held_out]

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


def _cumulative_lengths(file: DocumentFile, min_length: int, count_documents: bool) -> NDArray[np.int64]:
    """End position of every document in shuffled order, dropped ones with length 0: int64 [documents]."""
    kind = f"{'documents' if count_documents else 'tokens'}-{min_length}-{DOCUMENT_SEED}"
    return cached_or_built_array(
        file, kind, lambda target: _write_cumulative_lengths(target, file, min_length, count_documents)
    )


def _write_cumulative_lengths(target: Path, file: DocumentFile, min_length: int, count_documents: bool) -> None:
    ends = np.lib.format.open_memmap(target, mode="w+", dtype=np.int64, shape=(len(file),))
    total = 0
    for start in range(0, len(file), _BLOCK):
        stop = min(start + _BLOCK, len(file))
        counts = file.counts_of(permute(np.arange(start, stop), len(file), DOCUMENT_SEED))
        selected = counts >= max(1, min_length)
        ends[start:stop] = total + np.cumsum(selected if count_documents else np.where(selected, counts, 0))
        total = int(ends[stop - 1])
    ends.flush()
