"""Reads arrays of token ids, one after the other without a format of documents, memory-mapped.

Four kinds of files: a .npy with NumPy's header; raw little-endian integers (nanoGPT's .bin; OLMo's files, which are
named .npy without being any); llm.c's .bin, raw integers after a header of 256 int32; and datatrove's .ds, raw integers
with document ends in .ds.index, the width of a token in .ds.metadata, and a loss mask, a byte a token, in .ds.loss.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from internlm.data.documents.found_kinds import identify
from internlm.data.documents.index_cache import cached_or_built_array
from internlm.data.remote.local_file import LazyFile
from internlm.utils.errors import DataError
from internlm.utils.npy_files import map_npy

_NPY_MAGIC = b"\x93NUMPY"
_BLOCK = 1 << 24
"""Tokens searched for separators at once."""

RAW_DTYPES = ("uint16", "uint32")

_LLMC_HEADER_BYTES = 1024
_LLMC_DTYPES = {20240520: "uint16", 20240801: "uint32"}
"""First int32 of the header of llm.c -> dtype of its tokens; the third is their number."""


class TokenArray:
    """Random access to the documents of an array of token ids.

    Args:
        path: the file.
        vocab_size: ids must be smaller; checked when a document is read. None accepts any.
        dtype: of raw integers; the other kinds know their own. None: raw files are refused.
        separator: id that ends a document and is its last token; None: the file is one document. Files of datatrove
            have their document ends beside them, with which this id is not searched.

    Attributes:
        inputs: the file, and its .index and .loss if it has them.
        reading: dtype and separator.
        dtype: of the tokens.

    Raises:
        DataError: the file is missing or malformed, or its dtype is not known.
    """

    def __init__(
        self,
        path: str | Path,
        vocab_size: int | None = None,
        *,
        dtype: str | None = None,
        separator: int | None = None,
    ) -> None:
        self.path = Path(path)
        self.vocab_size = vocab_size
        if not self.path.is_file():
            raise DataError(f"{self.path}: no such file")
        ends, mask = ends_path(self.path), _mask_path(self.path)
        self.inputs = (self.path, *(each for each in (ends, mask) if each.is_file()))
        load = functools.partial(_map_tokens, path=self.path, dtype=dtype)
        self._tokens = LazyFile(self.path, f"tokens-{dtype}", load)
        head = self._tokens.head()
        self.dtype, self._num_tokens = head.dtype, len(head)
        self.reading = f"{self.dtype.str[1:]}-{separator}"
        # Of the first token; the rest of the file is tokens.
        self._offset = self.path.stat().st_size - head.nbytes
        self._loss_mask = self._map_loss_mask()
        self._ends = self._read_ends(ends) if ends.is_file() else self._find_ends(separator)

    def _map_loss_mask(self) -> LazyFile[NDArray[np.uint8]] | None:
        path = _mask_path(self.path)
        if not path.is_file():
            return None
        if path.stat().st_size != self._num_tokens:
            raise DataError(
                f"{path}: {path.stat().st_size:,} bytes for the {self._num_tokens:,} tokens of {self.path.name}: "
                "another dtype than data.array_dtype, or it belongs to another file"
            )
        return LazyFile(path, "bytes", _map_bytes)

    def _read_ends(self, path: Path) -> NDArray[np.int64]:
        ends = np.fromfile(path, dtype="<u8").astype(np.int64)
        if len(ends) and ((np.diff(ends, prepend=0) < 0).any() or ends[-1] != self._num_tokens):
            raise DataError(
                f"{path}: the document ends do not ascend to the {self._num_tokens:,} tokens of {self.path.name}: "
                "another dtype than data.array_dtype, or it belongs to another file"
            )
        return ends

    def _find_ends(self, separator: int | None) -> NDArray[np.int64]:
        if separator is None:
            return np.array([self._num_tokens] if self._num_tokens else [], dtype=np.int64)
        ends: NDArray[np.int64] = cached_or_built_array(
            self, "ends", lambda target: np.save(target, _ends_after(self._tokens.get(), separator))
        )
        if len(ends) == 1 and self._tokens.get()[-1] != separator:
            raise DataError(
                f"{self.path}: the id {separator} (data.array_separator) does not occur in it; set the id that ends a "
                "document, or None if the file is one document"
            )
        return ends

    def __len__(self) -> int:
        """Number of documents in the file."""
        return len(self._ends)

    def counts(self, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        """Token counts of the documents [start, stop): int64 [stop - start]."""
        stop = len(self) if stop is None else min(stop, len(self))
        return self.counts_of(np.arange(start, stop))

    def counts_of(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Token counts of the given documents: int64 of the same shape."""
        return self._ends[documents] - self._starts_of(documents)

    def check_offsets(self, start: int, stop: int) -> None:
        """Nothing to check: ends were found in the file, or compared with its length."""

    def read(
        self, document: int, start: int = 0, stop: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Read tokens [start, stop) of a document.

        Returns:
            (ids int64, loss_mask bool), both [stop - start]; every token has a loss, unless a .loss says otherwise.

        Raises:
            DataError: an id is below 0 or outside the vocabulary.
        """
        first, end = int(self._starts_of(np.array([document]))[0]), int(self._ends[document])
        last = end if stop is None else min(first + stop, end)
        ids = np.asarray(self._tokens.get()[min(first + start, last) : last], dtype=np.int64)
        if len(ids):
            largest, smallest = int(ids.argmax()), int(ids.argmin())
            if ids[smallest] < 0:
                raise DataError(f"{self._at(document, first + start + smallest)} is {ids[smallest]}, below 0")
            if self.vocab_size is not None and ids[largest] >= self.vocab_size:
                raise DataError(
                    f"{self._at(document, first + start + largest)} is {ids[largest]}, outside the vocabulary of "
                    f"{self.vocab_size}: set model.vocab_size to that of the tokenizer that made the file; if it is, "
                    "check data.array_dtype"
                )
        if self._loss_mask is not None:
            return ids, self._loss_mask.get()[min(first + start, last) : last] != 0
        return ids, np.ones(len(ids), dtype=np.bool_)

    def _at(self, document: int, token: int) -> str:
        """Where a token of the file is, for messages."""
        return f"{self.path}: document {document} at byte {self._offset + token * self.dtype.itemsize}: token {token}"

    def _starts_of(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.where(documents > 0, self._ends[np.maximum(documents - 1, 0)], 0)


def ends_path(path: Path) -> Path:
    """Datatrove's file of document ends, uint64 in tokens, beside a .ds."""
    return path.with_name(path.name + ".index")


def _mask_path(path: Path) -> Path:
    """Datatrove's loss mask beside a .ds."""
    return path.with_name(path.name + ".loss")


def _metadata_dtype(path: Path) -> str | None:
    """The dtype by datatrove's file beside a .ds, whose first line is "TOKENIZER|BYTES"; None if there is none."""
    metadata = path.with_name(path.name + ".metadata")
    if not metadata.is_file():
        return None
    first = metadata.read_text(encoding="utf-8", errors="replace").split("\n", maxsplit=1)[0]
    return {"2": "uint16", "4": "uint32"}.get(first.rpartition("|")[2].strip())


def _ends_after(tokens: NDArray[np.integer], separator: int) -> NDArray[np.int64]:
    """The position after each separator, and the end of what follows the last one."""
    found = [
        np.flatnonzero(tokens[start : start + _BLOCK] == separator) + (start + 1)
        for start in range(0, len(tokens), _BLOCK)
    ]
    ends = np.concatenate(found).astype(np.int64) if found else np.zeros(0, dtype=np.int64)
    return ends if not len(tokens) or (len(ends) and ends[-1] == len(tokens)) else np.append(ends, len(tokens))


def _map_tokens(content: Path, path: Path, dtype: str | None) -> NDArray[np.integer]:
    with open(content, "rb") as file:
        start = file.read(3 * 4)
    if start.startswith(_NPY_MAGIC):
        tokens = map_npy(content, "copy it again")
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise DataError(f"{path}: {tokens.dtype} of shape {tokens.shape}; expected integers of shape [tokens]")
        _check_dtype(path, tokens.dtype.name, dtype)
        return tokens
    magic, _, count = np.frombuffer(start, dtype="<i4") if len(start) == 12 else (0, 0, 0)
    if int(magic) in _LLMC_DTYPES:
        _check_dtype(path, _LLMC_DTYPES[int(magic)], dtype)
        return _map_llmc(content, path, _LLMC_DTYPES[int(magic)], int(count))
    recorded = _metadata_dtype(path)
    if recorded is not None:
        _check_dtype(path, recorded, dtype)
    dtype = dtype or recorded
    if dtype is None:
        found = identify(path)
        if found is not None and found.type != "arrays":
            raise DataError(f"{path}: {found.what}, not an array of token ids; {found.advice}")
        raise DataError(
            f"{path}: raw integers without a header; set data.array_dtype (`internlm data`: --array-dtype) to "
            f"{' or '.join(map(repr, RAW_DTYPES))}. If it belongs to a Megatron dataset or a tokenized file, copy its "
            f"{path.stem}.idx or {path.name}.meta beside it"
        )
    size, width = content.stat().st_size, np.dtype(dtype).itemsize
    if size % width:
        raise DataError(f"{path}: {size:,} bytes are no whole number of {dtype}: another dtype, or truncated")
    return np.memmap(content, mode="r", dtype=np.dtype(dtype).newbyteorder("<")) if size else np.zeros(0, dtype)


def _map_llmc(content: Path, path: Path, dtype: str, count: int) -> NDArray[np.integer]:
    size = content.stat().st_size - _LLMC_HEADER_BYTES
    if size != count * np.dtype(dtype).itemsize:
        raise DataError(
            f"{path}: its header (of llm.c) announces {count:,} tokens of {dtype}, but {max(size, 0):,} bytes "
            "follow it; copy it again"
        )
    raw = np.dtype(dtype).newbyteorder("<")
    return np.memmap(content, mode="r", dtype=raw, offset=_LLMC_HEADER_BYTES) if count else np.zeros(0, raw)


def _map_bytes(path: Path) -> NDArray[np.uint8]:
    return np.memmap(path, mode="r", dtype=np.uint8) if path.stat().st_size else np.zeros(0, np.uint8)


def _check_dtype(path: Path, actual: str, dtype: str | None) -> None:
    if dtype is not None and actual != np.dtype(dtype).name:
        raise DataError(f"{path}: an array of {actual}, but data.array_dtype is '{dtype}'")
