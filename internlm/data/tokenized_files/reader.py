"""Reads tokenized files (`NAME.bin` + `NAME.bin.meta`), memory-mapped.

Owns the meaning of a line (signs, masked zeros) and the detection of damaged files. Must not know packing, order or
types. Format: doc/data.md. InternEvo's files (int32 .meta) are read as well.
"""

from __future__ import annotations

import json
import mmap
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internlm.data.documents.found_kinds import identify
from internlm.data.remote.local_file import LazyFile
from internlm.data.tokenized_files.writer import map_meta, meta_path, rebuild_hint
from internlm.utils.errors import DataError

_LINE_START = b'{"tokens":'
_SLICE_FACTOR = 4
"""If a document is more than this many times longer than the requested slice, only the slice is parsed."""
_CACHED_DOCUMENTS = 2
"""Number of documents with cached comma positions: consecutive slices of a long document scan it once."""


class TokenizedFile:
    """Random access to the documents of a tokenized file.

    Args:
        path: the .bin file.
        vocab_size: ids must be smaller; checked when a document is read. None accepts any.
        image_token_id: id of the placeholders of pictures, which may be outside the vocabulary.

    Attributes:
        inputs: the .bin and its .meta.

    Raises:
        DataError: a file is missing, or the .meta is not an integer array of shape [documents, >= 2].
    """

    def __init__(self, path: str | Path, vocab_size: int | None = None, image_token_id: int | None = None) -> None:
        self.path = Path(path)
        self.vocab_size, self._image_token_id = vocab_size, image_token_id
        if not self.path.is_file():
            raise DataError(f"{self.path}: no such file")
        if not meta_path(self.path).is_file():
            found = identify(self.path)
            if found is not None and found.type != "tokenized":
                raise DataError(
                    f"{self.path}: {found.what}, not a tokenized file (NAME.bin with NAME.bin.meta); {found.advice}"
                )
            raise DataError(f"{meta_path(self.path)} is missing; {rebuild_hint(self.path)}")
        meta = map_meta(self.path)
        if meta.ndim != 2 or meta.shape[1] < 2 or meta.dtype.kind not in "iu":
            raise DataError(
                f"{meta_path(self.path)} has {meta.dtype} of shape {meta.shape}, expected integers of shape "
                f"[documents, 2]; {rebuild_hint(self.path)}"
            )
        self._meta = meta
        self.inputs = (self.path, meta_path(self.path))
        self.reading = ""
        self.size = self.path.stat().st_size
        self._lazy_map = LazyFile(self.path, "mmap", _map_file)
        self._commas: OrderedDict[int, tuple[int, int, NDArray[np.int64]]] = OrderedDict()

    @property
    def _map(self) -> mmap.mmap | None:
        return self._lazy_map.get()

    def __len__(self) -> int:
        """Number of documents in the file."""
        return len(self._meta)

    def counts(self, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        """Token counts of the documents [start, stop): int64 [stop - start]."""
        return np.asarray(self._meta[start:stop, -1], dtype=np.int64)

    def counts_of(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Token counts of the given documents: int64 of the same shape."""
        return np.asarray(self._meta[documents, -1], dtype=np.int64)

    def check_offsets(self, start: int, stop: int) -> None:
        """Check that the .meta puts the documents [start, stop) inside the .bin.

        Raises:
            DataError: it does not; names the first such document.
        """
        offsets, counts = self._meta[start:stop, 0], self._meta[start:stop, -1]
        wrong = np.flatnonzero((offsets < 0) | (offsets >= self.size) | (counts < 0))
        if len(wrong):
            document = start + int(wrong[0])
            offset, count = int(self._meta[document, 0]), int(self._meta[document, -1])
            if offset < 0:
                reason = "a negative offset: 32-bit overflow in a file over 2 GiB"
            elif count < 0:
                reason = "a negative number of tokens"
            else:
                reason = "beyond the end: the .bin is truncated, or the .meta belongs to another file"
            raise DataError(
                f"{self.path} ({self.size} bytes): by the .meta, document {document} has {count} tokens at byte "
                f"{offset}, {reason}. Copy the .bin again, or {rebuild_hint(self.path)}"
            )

    def read(
        self, document: int, start: int = 0, stop: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Read tokens [start, stop) of a document.

        Returns:
            (ids int64, loss_mask bool), both [stop - start]; ids are non-negative, and the mask is False where a token
            contributes no loss.

        Raises:
            DataError: the line does not match the .meta, is not JSON, or has an id outside the vocabulary.
        """
        count = int(self._meta[document, -1])
        stop = count if stop is None else min(stop, count)
        if count > _SLICE_FACTOR * (stop - start):
            sliced = self._read_slice(document, count, start, stop)
            if sliced is not None:
                return sliced
        begin, end = self._line_range(document)
        signed, masked_zeros = self._parse(document, begin, self._map[begin:end] if self._map else b"", count)
        return self._split_mask(document, begin, signed[start:stop], masked_zeros, start)

    def read_field(self, document: int, name: str) -> list[Any] | None:
        """Read a list beside the tokens of a document; None if its line has no such field.

        Raises:
            DataError: the line is not JSON, or the value is not a list.
        """
        begin, end = self._line_range(document)
        line = self._map[begin:end] if self._map else b""
        if f'"{name}"'.encode() not in line:
            return None
        try:
            value = json.loads(line).get(name)
        except ValueError as error:
            raise self._not_json(document, begin, error) from error
        if value is not None and not isinstance(value, list):
            raise DataError(self._at(document, begin) + f"'{name}' is not a list. Tokenize the source again")
        return value

    def _line_range(self, document: int) -> tuple[int, int]:
        """Byte range of a document's line, without its newline."""
        begin = int(self._meta[document, 0])
        if self._map is None or not 0 <= begin < self.size:
            self.check_offsets(document, document + 1)
            raise DataError(self._at(document, begin) + "the .bin is empty")
        if begin > 0 and self._map[begin - 1] != ord("\n"):
            raise self._mismatch(document, begin, "is not at the start of a line")
        end = self._map.find(b"\n", begin)
        return begin, self.size if end < 0 else end

    def _read_slice(
        self, document: int, count: int, start: int, stop: int
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]] | None:
        """`read` without parsing the whole line; None if the line is not formatted as `encode_line` does."""
        found = self._commas.get(document)
        if found is None:
            begin, end = self._line_range(document)
            assert self._map is not None
            opening = begin + len(_LINE_START)
            if self._map[begin:opening] != _LINE_START:
                return None
            opening = self._map.find(b"[", opening, end)
            closing = self._map.find(b"]", opening, end)
            if opening < 0 or closing < 0:
                return None
            text = np.frombuffer(self._map, dtype=np.uint8, count=closing - opening - 1, offset=opening + 1)
            commas = np.flatnonzero(text == ord(",")) + (opening + 1)
            if len(commas) + 1 != count:
                return None
            # Token i is between bounds[i] and bounds[i + 1], both exclusive.
            found = (begin, end, np.concatenate(([opening], commas, [closing])))
            self._commas[document] = found
            if len(self._commas) > _CACHED_DOCUMENTS:
                self._commas.popitem(last=False)
        begin, end, bounds = found
        assert self._map is not None
        signed = _parse_ints(self._map[int(bounds[start]) + 1 : int(bounds[stop])])
        if signed is None or len(signed) != stop - start:
            return None
        masked_zeros: list[int] = []
        rest = self._map[int(bounds[-1]) : end]
        if rest.strip() != b"]}":
            try:
                masked_zeros = json.loads(b'{"tokens": [' + rest).get("masked_zeros", [])
            except ValueError:
                return None
        return self._split_mask(document, begin, signed, masked_zeros, start)

    def _parse(self, document: int, begin: int, line: bytes, count: int) -> tuple[NDArray[np.int64], list[int]]:
        """Parse a whole line into its signed tokens and the positions of masked zeros."""
        signed: NDArray[np.int64] | None = None
        masked_zeros: list[int] = []
        if line.startswith(_LINE_START) and line.endswith(b"]}") and line.count(b"]") == 1:
            text = line[line.find(b"[") + 1 : -2]
            signed = _parse_ints(text) if count else None
            if signed is not None and len(signed) != text.count(b",") + 1:
                signed = None
        if signed is None:
            try:
                value = json.loads(line)
            except ValueError as error:
                if begin + len(line) == self.size:
                    raise DataError(
                        self._at(document, begin) + "the line is incomplete: the .bin is truncated. "
                        "Copy it again, or tokenize the source again"
                    ) from error
                raise self._not_json(document, begin, error) from error
            tokens = value.get("tokens") if isinstance(value, dict) else None
            signed = np.array(tokens if tokens else [], dtype=None if tokens else np.int64)
            if not isinstance(tokens, list) or signed.ndim != 1 or signed.dtype.kind != "i":
                raise DataError(
                    self._at(document, begin) + 'the line is not {"tokens": [integers]}. Tokenize the source again'
                )
            masked_zeros = value.get("masked_zeros", [])
        if len(signed) != count:
            raise self._mismatch(document, begin, f"has {len(signed)} tokens, but {count} by the .meta")
        return signed, masked_zeros

    def _split_mask(
        self, document: int, begin: int, signed: NDArray[np.int64], masked_zeros: list[int], start: int
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Split signed tokens, of which the first has position `start`, into ids and loss mask."""
        ids = np.abs(signed)
        loss_mask = signed >= 0
        if masked_zeros:
            positions = np.asarray(masked_zeros) - start if isinstance(masked_zeros, list) else np.zeros(0)
            inside = positions[(positions >= 0) & (positions < len(ids))]
            if positions.dtype.kind != "i" or ids[inside].any():
                raise DataError(
                    self._at(document, begin) + "'masked_zeros' is not a list of positions whose token is 0. "
                    "Tokenize the source again"
                )
            loss_mask[inside] = False
        words = ids if self._image_token_id is None else np.where(ids == self._image_token_id, 0, ids)
        if self.vocab_size is not None and len(ids) and int(words.max()) >= self.vocab_size:
            position = start + int(words.argmax())
            raise DataError(
                self._at(document, begin) + f"token {int(words.max())} at position {position} is outside the "
                f"vocabulary of {self.vocab_size}. Set model.vocab_size to the size of the tokenizer that made this "
                "file, or tokenize the source again"
            )
        return ids, loss_mask

    def _at(self, document: int, offset: int) -> str:
        return f"{self.path}: document {document} at byte {offset}: "

    def _not_json(self, document: int, begin: int, error: ValueError) -> DataError:
        return DataError(self._at(document, begin) + f"the line is not JSON ({error}). Tokenize the source again")

    def _mismatch(self, document: int, offset: int, problem: str) -> DataError:
        return DataError(
            f"{self.path}: document {document} at byte {offset} {problem}: the .meta does not belong to this .bin; "
            f"{rebuild_hint(self.path)}"
        )


def _map_file(path: Path) -> mmap.mmap | None:
    with open(path, "rb") as file:
        # mmap refuses an empty file.
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else None


def _parse_ints(text: bytes) -> NDArray[np.int64] | None:
    """Parse comma-separated integers; None for anything else, of which the JSON parser gives a precise error."""
    if text.translate(None, b"0123456789-, "):
        return None
    try:
        return np.fromstring(text, dtype=np.int64, sep=",")
    except ValueError:
        return None
