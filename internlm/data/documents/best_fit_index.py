"""The documents of each best-fit bin of a file; built once and cached on disk.

Documents are taken in the shuffled order of their file, in windows of a fixed number, cut into pieces of at most
seq_len tokens, and packed per window. Building takes memory for one window.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
from numpy.typing import NDArray

from internlm.data.documents.document_file import DocumentFile
from internlm.data.documents.document_index import DOCUMENT_SEED, summarize
from internlm.data.documents.index_cache import cached_or_built_array
from internlm.data.packing.best_fit import pack_best_fit
from internlm.data.permutation import permute

_WINDOW = 1 << 18
"""Documents of a window. The packing depends on it."""
_MAX_PIECES = 1 << 20
"""Pieces of a window with long documents. The packing depends on it."""
_HEADER = 3
"""int64 values before the pieces: numbers of pieces and bins, and the stride of a document."""


class BestFitIndex:
    """Maps bins of a file to pieces of documents.

    Args:
        file: of any format.
        min_length: minimum number of tokens; shorter documents are dropped.
        seq_len: maximum length of a piece, in tokens.
        capacity: tokens of a bin, at least `seq_len`.
        held_out: number of documents at the end of the shuffled order that are in no bin.
    """

    def __init__(self, file: DocumentFile, min_length: int, seq_len: int, capacity: int, held_out: int = 0) -> None:
        self._seq_len = seq_len
        kind = f"best_fit-{min_length}-{seq_len}-{capacity}-{_WINDOW}-{_MAX_PIECES}-{DOCUMENT_SEED}"
        if held_out:
            kind += f"-without-{held_out}"
        values = cached_or_built_array(
            file, kind, lambda target: _write_bins(target, file, min_length, seq_len, capacity, held_out)
        )
        num_pieces, self._num_bins, self._stride = (int(value) for value in values[:_HEADER])
        self._pieces = values[_HEADER : _HEADER + num_pieces]
        self._ends = values[_HEADER + num_pieces :]

    def __len__(self) -> int:
        """Number of bins."""
        return self._num_bins

    def pieces(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Find the pieces of a bin, in the shuffled order of their documents.

        Returns:
            (documents, starts), both int64 [n]: the index of each document in the file, and the first token of the
            piece, which ends after seq_len tokens or with its document.
        """
        first = int(self._ends[number - 1]) if number else 0
        codes = np.asarray(self._pieces[first : int(self._ends[number])])
        return codes // self._stride, codes % self._stride * self._seq_len


def _write_bins(target: Path, file: DocumentFile, min_length: int, seq_len: int, capacity: int, held_out: int) -> None:
    """Write the header, the pieces by bin as document * stride + piece, and the end of each bin among them."""
    stride = max(1, -(-summarize(file, min_length).longest // seq_len))
    num_pieces = num_bins = 0
    with TemporaryFile(dir=target.parent) as pieces_file, TemporaryFile(dir=target.parent) as ends_file:
        for documents, numbers, lengths in _windows(file, min_length, seq_len, held_out):
            bins = pack_best_fit(lengths, capacity)
            by_bin = np.argsort(bins, kind="stable")
            pieces_file.write((documents * stride + numbers)[by_bin].tobytes())
            ends = num_pieces + np.cumsum(np.bincount(bins))
            ends_file.write(ends.astype(np.int64).tobytes())
            num_pieces, num_bins = num_pieces + len(bins), num_bins + len(ends)
        with open(target, "wb") as out:
            header = {"descr": "<i8", "fortran_order": False, "shape": (_HEADER + num_pieces + num_bins,)}
            np.lib.format.write_array_header_1_0(out, header)
            out.write(np.array([num_pieces, num_bins, stride], dtype=np.int64).tobytes())
            for part in (pieces_file, ends_file):
                part.seek(0)
                shutil.copyfileobj(part, out, 1 << 20)


def _windows(
    file: DocumentFile, min_length: int, seq_len: int, held_out: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """Cut the shuffled documents into pieces: (document, number within it, length), each int64 [pieces of a window]."""
    num_documents = len(file) - held_out
    for start in range(0, num_documents, _WINDOW):
        documents = permute(np.arange(start, min(start + _WINDOW, num_documents)), len(file), DOCUMENT_SEED)
        counts = file.counts_of(documents)
        kept = counts >= max(1, min_length)
        documents, counts = documents[kept], counts[kept]
        ends = np.cumsum(-(-counts // seq_len))
        first = 0
        while first < len(documents):
            before = int(ends[first - 1]) if first else 0
            # At least one document, however long.
            last = max(int(np.searchsorted(ends, before + _MAX_PIECES, side="right")), first + 1)
            owners = np.repeat(np.arange(first, last), np.diff(ends[first:last], prepend=before))
            numbers = before + np.arange(len(owners)) - np.where(owners > 0, ends[owners - 1], 0)
            lengths = np.minimum(counts[owners] - numbers * seq_len, seq_len)
            yield documents[owners], numbers, lengths
            first = last
