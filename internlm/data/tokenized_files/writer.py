"""Writes tokenized files: `NAME.bin` (one JSON object a line) and `NAME.bin.meta` (offset and length of each line).

Owns the format (doc/data.md) and atomic writing. Must not know where tokens come from. Imports no torch, so that
tokenizing processes start fast.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from internlm.utils.errors import DataError
from internlm.utils.npy_files import map_npy

META_SUFFIX = ".meta"
_NPY_MAGIC = b"\x93NUMPY\x01\x00"
_NPY_HEADER_BYTES = 128
_FLUSH_ROWS = 8192


def meta_path(bin_path: Path) -> Path:
    """Path of the .meta file of a .bin file."""
    return bin_path.with_name(bin_path.name + META_SUFFIX)


def rebuild_hint(path: Path) -> str:
    """The command that rebuilds a .meta file."""
    return f"if the .bin is correct, rebuild the .meta: python tools/tokenizer.py --rebuild-meta {path}"


def map_meta(path: Path) -> NDArray[np.int64]:
    """The array of the .meta file of a .bin file, memory-mapped; its shape and dtype are not checked.

    Raises:
        DataError: it is no complete .npy array.
    """
    return map_npy(meta_path(path), rebuild_hint(path))


def encode_line(tokens: Sequence[int], masked_zeros: Sequence[int] = (), images: Sequence[Any] = ()) -> bytes:
    """Encode a document as a line of a .bin file, with its newline.

    Args:
        tokens: token ids; `-t` means "token t without loss".
        masked_zeros: positions of tokens 0 without loss, which a sign cannot mark.
        images: where its pictures are; see `internlm.data.images.image_source`.
    """
    # Not repr: numpy integers have a repr that is not JSON.
    values = tokens.tolist() if isinstance(tokens, np.ndarray) else list(tokens)
    text = json.dumps(values, separators=(",", ":"))
    extra = f', "masked_zeros": {list(masked_zeros)!r}' if masked_zeros else ""
    if images:
        extra += f', "images": {json.dumps(list(images))}'
    return f'{{"tokens": {text}{extra}}}\n'.encode("ascii")


def encode_masked_line(ids: Sequence[int], loss_mask: Sequence[bool], images: Sequence[Any] = ()) -> bytes:
    """Encode a document from non-negative ids and a mask that is True where a token contributes loss.

    Args:
        ids: token ids.
        loss_mask: as many values.
        images: see `encode_line`.
    """
    signed = [token if loss else -token for token, loss in zip(ids, loss_mask, strict=True)]
    zeros = [i for i, (token, loss) in enumerate(zip(ids, loss_mask, strict=True)) if token == 0 and not loss]
    return encode_line(signed, zeros, images)


class TokenizedWriter:
    """Streams documents into NAME.bin and NAME.bin.meta with bounded memory.

    Files get their final names in `close()`; an exception inside the `with` block discards them. A file must have only
    one writer at a time.

    Args:
        path: the .bin file.
        append: whether to continue an existing file. Its .bin grows in place, invisible to readers until `close()`
            replaces the .meta. Bytes left by an interrupted append are truncated first.

    Raises:
        DataError: `path` exists and `append` is False, or is not named *.bin.
    """

    def __init__(self, path: str | Path, append: bool = False) -> None:
        self.path = Path(path)
        if self.path.suffix != ".bin":
            raise DataError(f"{self.path}: a tokenized file must be named *.bin")
        if self.path.exists() and not append:
            raise DataError(f"{self.path} exists: choose another name, remove it, or append to it (--append)")
        self.num_documents = 0
        self.num_tokens = 0
        self._appending = append and self.path.exists()
        self._bin_target = self.path if self._appending else self.path.with_name(self.path.name + ".tmp")
        self._meta_target = meta_path(self.path).with_name(self.path.name + META_SUFFIX + ".tmp")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._bin: BinaryIO = open(self._bin_target, "r+b" if self._appending else "wb")  # noqa: SIM115
        self._meta: BinaryIO = open(self._meta_target, "wb")  # noqa: SIM115
        self._meta.write(_npy_header(0))
        self._rows: list[tuple[int, int]] = []
        self._offset = 0
        if self._appending:
            self._copy_existing_meta()
        self._first_offset = self._offset

    def _copy_existing_meta(self) -> None:
        meta = map_meta(self.path)
        for start in range(0, len(meta), 1 << 20):
            rows = np.stack([meta[start : start + (1 << 20), 0], meta[start : start + (1 << 20), -1]], axis=1)
            self._meta.write(rows.astype("<i8").tobytes())
            self.num_tokens += int(rows[:, 1].sum())
        self.num_documents = len(meta)
        if len(meta):
            self._bin.seek(int(meta[-1, 0]))
            self._bin.readline()
            self._offset = self._bin.tell()
            self._bin.seek(self._offset - 1)
            if self._bin.read(1) != b"\n":
                self._bin.write(b"\n")
                self._offset += 1
        self._bin.truncate(self._offset)
        self._bin.seek(self._offset)

    def write(self, tokens: Sequence[int], masked_zeros: Sequence[int] = ()) -> None:
        """Append a document; see `encode_line`."""
        self.write_line(encode_line(tokens, masked_zeros), len(tokens))

    def write_line(self, line: bytes, num_tokens: int) -> None:
        """Append a document encoded by `encode_line`."""
        self._bin.write(line)
        self._rows.append((self._offset, num_tokens))
        self._offset += len(line)
        self.num_documents += 1
        self.num_tokens += num_tokens
        if len(self._rows) >= _FLUSH_ROWS:
            self._flush_rows()

    def write_file(self, path: Path) -> None:
        """Append all documents of another tokenized file, without parsing them."""
        meta = map_meta(path)
        self._flush_rows()
        rows = np.array(meta, dtype="<i8")
        rows[:, 0] += self._offset
        self._meta.write(rows.tobytes())
        with open(path, "rb") as source:
            while block := source.read(1 << 22):
                self._bin.write(block)
                self._offset += len(block)
        self.num_documents += len(rows)
        self.num_tokens += int(rows[:, 1].sum())

    def _flush_rows(self) -> None:
        if self._rows:
            self._meta.write(np.array(self._rows, dtype="<i8").tobytes())
            self._rows.clear()

    def close(self) -> None:
        """Rename the files to their final names, which makes the documents visible to readers."""
        if self._bin.closed:
            return
        self._flush_rows()
        self._meta.seek(0)
        self._meta.write(_npy_header(self.num_documents))
        for file in (self._bin, self._meta):
            file.flush()
            os.fsync(file.fileno())
            file.close()
        # The .meta first: readers look for *.bin, so after a crash in between they find nothing.
        os.replace(self._meta_target, meta_path(self.path))
        if not self._appending:
            os.replace(self._bin_target, self.path)

    def discard(self) -> None:
        """Discard what was written since the writer was opened."""
        if self._appending:
            self._bin.truncate(self._first_offset)
        self._bin.close()
        self._meta.close()
        self._meta_target.unlink(missing_ok=True)
        if not self._appending:
            self._bin_target.unlink(missing_ok=True)

    def __enter__(self) -> TokenizedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


def rebuild_meta(bin_path: str | Path) -> int:
    """Rebuild NAME.bin.meta from the lines of NAME.bin; returns the number of documents.

    Raises:
        DataError: a line is not a JSON object with a list of tokens.
    """
    path = Path(bin_path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    target = meta_path(path).with_name(path.name + META_SUFFIX + ".tmp")
    count = 0
    try:
        with open(target, "wb") as meta:
            meta.write(_npy_header(0))
            for offset, tokens in _lines(path):
                meta.write(np.array([offset, tokens], dtype="<i8").tobytes())
                count += 1
            meta.seek(0)
            meta.write(_npy_header(count))
        os.replace(target, meta_path(path))
    finally:
        target.unlink(missing_ok=True)
    return count


def _lines(path: Path) -> Iterator[tuple[int, int]]:
    offset = 0
    with open(path, "rb") as file:
        for document, line in enumerate(file):
            try:
                tokens = json.loads(line)["tokens"]
                yield offset, len(tokens)
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{path}: document {document} at byte {offset} is not a JSON object with 'tokens': {error!r}; "
                    "tokenize the source again, or truncate the file at this byte"
                ) from error
            offset += len(line)


def _npy_header(rows: int) -> bytes:
    """A .npy header of fixed size, so that the number of rows can be filled in at the end."""
    text = f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({rows}, 2), }}".encode("latin1")
    size = _NPY_HEADER_BYTES - len(_NPY_MAGIC) - 2
    return _NPY_MAGIC + size.to_bytes(2, "little") + text.ljust(size - 1) + b"\n"
