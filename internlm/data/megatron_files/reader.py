"""Reads Megatron's indexed datasets, `NAME.bin` + `NAME.idx` (MMIDIDX, version 1), memory-mapped.

Layout of an .idx, little-endian: the magic, version uint64, dtype code uint8, number of sequences S uint64, number of
document boundaries D + 1 uint64; then lengths int32 [S] in tokens, offsets int64 [S] into the .bin in bytes, and
document boundaries int64 [D + 1] in sequences. Multimodal files append a mode int8 [S]. The format is that of
megatron-core's `IndexedDataset` (https://github.com/NVIDIA/Megatron-LM).
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from internlm.data.documents.found_kinds import describe_found
from internlm.data.remote.local_file import LazyFile
from internlm.utils.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")

DTYPES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
"""Code in the .idx -> dtype of the .bin."""


def index_path(path: Path) -> Path:
    """The .idx of a .bin."""
    return path.with_suffix(".idx")


def _map_bytes(path: Path) -> NDArray[np.uint8]:
    return np.memmap(path, mode="r", dtype=np.uint8) if path.stat().st_size else np.zeros(0, np.uint8)


class MegatronFile:
    """Random access to the documents of a Megatron dataset.

    A document is the sequences between two document boundaries, one after the other. Every token has a loss, as in
    Megatron.

    Args:
        path: the .bin file.
        vocab_size: ids must be smaller; checked when a document is read. None accepts any.

    Attributes:
        inputs: the .bin and its .idx.
        dtype: of the tokens in the .bin.

    Raises:
        DataError: a file is missing, the .idx is malformed, or its tokens are not integers.
    """

    def __init__(self, path: str | Path, vocab_size: int | None = None) -> None:
        self.path = Path(path)
        self.vocab_size = vocab_size
        index = index_path(self.path)
        self.inputs = (self.path, index)
        self.reading = ""
        for each in self.inputs:
            if not each.is_file():
                raise DataError(
                    f"{each}: no such file; a Megatron dataset is NAME.bin with NAME.idx. "
                    + (describe_found(self.path, but="arrays") or "Copy both files")
                )
        self.size = self.path.stat().st_size
        with open(index, "rb") as file:
            header = file.read(HEADER.size)
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise DataError(
                f"{index}: not an index of a Megatron dataset (it starts with {header[:9]!r}); datasets of fairseq's "
                "older formats (data_impl 'lazy' or 'cached') must be preprocessed again with data_impl 'mmap'"
            )
        _, version, code, sequences, boundaries = HEADER.unpack(header)
        if version != VERSION:
            raise DataError(f"{index}: version {version} of the format; version {VERSION} is known")
        if code not in DTYPES or np.dtype(DTYPES[code]).kind not in "iu":
            name = np.dtype(DTYPES[code]).name if code in DTYPES else f"code {code}"
            raise DataError(f"{index}: tokens of dtype {name}; they must be integers")
        self.dtype = np.dtype(DTYPES[code])
        expected = HEADER.size + sequences * 12 + boundaries * 8
        actual = index.stat().st_size
        if actual not in (expected, expected + sequences):
            raise DataError(
                f"{index}: {actual:,} bytes, but its header announces {sequences:,} sequences and {boundaries:,} "
                f"document boundaries, which are {expected:,}; copy the file again"
            )
        # Views of bytes: the arrays are not aligned.
        data = np.memmap(index, mode="r", dtype=np.uint8) if actual else np.zeros(0, np.uint8)
        at = HEADER.size
        self._lengths = data[at : at + 4 * sequences].view(np.int32)
        at += 4 * sequences
        self._offsets = data[at : at + 8 * sequences].view(np.int64)
        at += 8 * sequences
        self._bounds = data[at : at + 8 * boundaries].view(np.int64)
        if boundaries < 1 or self._bounds[0] != 0 or self._bounds[-1] != sequences:
            raise DataError(f"{index}: the document boundaries do not run from 0 to the {sequences:,} sequences")
        modes = data[expected:]
        if modes.any():
            raise DataError(
                f"{index}: {np.count_nonzero(modes):,} of its {sequences:,} sequences are not text (multimodal data), "
                "which is not supported"
            )
        self._tokens = LazyFile(self.path, "bytes", _map_bytes)

    def __len__(self) -> int:
        """Number of documents in the file."""
        return len(self._bounds) - 1

    def counts(self, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        """Token counts of the documents [start, stop): int64 [stop - start]."""
        stop = len(self) if stop is None else min(stop, len(self))
        if stop <= start:
            return np.zeros(0, dtype=np.int64)
        bounds = np.asarray(self._bounds[start : stop + 1])
        lengths = np.asarray(self._lengths[bounds[0] : bounds[-1]], dtype=np.int64)
        ends = np.concatenate(([0], np.cumsum(lengths)))
        return np.diff(ends[bounds - bounds[0]])

    def counts_of(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Token counts of the given documents: int64 of the same shape."""
        first, last = np.asarray(self._bounds[documents]), np.asarray(self._bounds[documents + 1])
        if (last - first == 1).all():
            return np.asarray(self._lengths[first], dtype=np.int64)
        return np.array([int(self._lengths[a:b].sum(dtype=np.int64)) for a, b in zip(first, last, strict=True)])

    def check_offsets(self, start: int, stop: int) -> None:
        """Check that the documents [start, stop) are inside the .bin.

        Raises:
            DataError: one is not; names the first.
        """
        bounds = np.asarray(self._bounds[start : stop + 1])
        if (np.diff(bounds) < 0).any():
            raise DataError(f"{index_path(self.path)}: the document boundaries do not ascend after document {start}")
        offsets = np.asarray(self._offsets[bounds[0] : bounds[-1]])
        lengths = np.asarray(self._lengths[bounds[0] : bounds[-1]], dtype=np.int64)
        wrong = np.flatnonzero((offsets < 0) | (lengths < 0) | (offsets + lengths * self.dtype.itemsize > self.size))
        if len(wrong):
            first = int(wrong[0])
            document = start + int(np.searchsorted(bounds, bounds[0] + first, side="right")) - 1
            raise DataError(
                f"{self.path} ({self.size:,} bytes): by the .idx, document {document} has a sequence of "
                f"{lengths[first]:,} tokens at byte {offsets[first]:,}, which is beyond the end: the .bin is "
                "truncated, or the .idx belongs to another file. Copy both again"
            )

    def read(
        self, document: int, start: int = 0, stop: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Read tokens [start, stop) of a document.

        Returns:
            (ids int64, loss_mask bool), both [stop - start]; every token has a loss.

        Raises:
            DataError: the document is not inside the .bin, or has an id outside the vocabulary.
        """
        parts = []
        position = 0
        for sequence in range(int(self._bounds[document]), int(self._bounds[document + 1])):
            length = int(self._lengths[sequence])
            first = max(start - position, 0)
            last = length if stop is None else min(stop - position, length)
            if first < last:
                begin = int(self._offsets[sequence]) + first * self.dtype.itemsize
                end = begin + (last - first) * self.dtype.itemsize
                if begin < 0 or end > self.size:
                    self.check_offsets(document, document + 1)
                parts.append(self._tokens.get()[begin:end].view(self.dtype))
            position += length
            if stop is not None and position >= stop:
                break
        ids = np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)
        if len(ids):
            self._check_ids(document, start, ids)
        return ids, np.ones(len(ids), dtype=np.bool_)

    def _check_ids(self, document: int, start: int, ids: NDArray[np.int64]) -> None:
        if int(ids.min()) < 0:
            position = start + int(ids.argmin())
            raise DataError(
                f"{self._at(document, position)}token {int(ids.min())} at position {position} is below 0: the .bin is "
                "damaged, or the .idx belongs to another file"
            )
        if self.vocab_size is not None and int(ids.max()) >= self.vocab_size:
            position = start + int(ids.argmax())
            raise DataError(
                f"{self._at(document, position)}token {int(ids.max())} at position {position} is outside the "
                f"vocabulary of {self.vocab_size}. Set model.vocab_size to the size of the tokenizer that made it"
            )

    def sequence_lengths(self, document: int) -> NDArray[np.int64]:
        """Token counts of the sequences of a document: int64 [sequences]."""
        return np.asarray(self._lengths[int(self._bounds[document]) : int(self._bounds[document + 1])], dtype=np.int64)

    def _at(self, document: int, position: int) -> str:
        """Where a token is, for messages."""
        first, last = int(self._bounds[document]), int(self._bounds[document + 1])
        ends = np.cumsum(self._lengths[first:last], dtype=np.int64)
        sequence = int(np.searchsorted(ends, position, side="right"))
        within = position - (int(ends[sequence - 1]) if sequence else 0)
        offset = int(self._offsets[first + sequence]) + within * self.dtype.itemsize
        return f"{self.path}: document {document} at byte {offset}: "
