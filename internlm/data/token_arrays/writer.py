"""Writes arrays of token ids; see `internlm.data.token_arrays.reader` for the three kinds of files."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from internlm.data.token_arrays.reader import RAW_DTYPES, ends_path
from internlm.utils.errors import DataError

_NPY_MAGIC = b"\x93NUMPY\x01\x00"
_NPY_HEADER_BYTES = 128
ARRAY_SUFFIXES = (".npy", ".bin", ".ds")


class ArrayWriter:
    """Streams documents into an array, in a context; the files get their names when it ends without an error.

    The suffix of `path` chooses the kind: .npy with NumPy's header, .bin raw, .ds raw with the document ends beside it.

    Args:
        path: the file.
        dtype: of the tokens.
        separator: ends each document of a .npy or .bin; appended where a document does not end with it.

    Raises:
        DataError: a file exists already, the suffix is none of the three, or a .npy or .bin has no separator.
    """

    def __init__(self, path: str | Path, dtype: np.dtype[np.integer], separator: int | None = None) -> None:
        self.path = path = Path(path)
        self.dtype, self._separator = np.dtype(dtype).newbyteorder("<"), separator
        if path.suffix not in ARRAY_SUFFIXES:
            raise DataError(f"{path}: an array of tokens must be named *{', *'.join(ARRAY_SUFFIXES)}")
        if path.suffix != ".npy" and self.dtype.name not in RAW_DTYPES:
            raise DataError(f"{path}: raw tokens are {' or '.join(RAW_DTYPES)}, not {self.dtype.name}; give --dtype")
        self._has_ends = path.suffix == ".ds"
        if not self._has_ends and separator is None:
            raise DataError(
                f"{path}: {path.suffix} has no room for document ends; give the id that ends a document, such as the "
                "tokenizer's eos (--separator ID), or write NAME.ds"
            )
        self._metadata = path.with_name(path.name + ".metadata")
        outputs = (path, ends_path(path)) if self._has_ends else (path,)
        for each in outputs:
            if each.exists():
                raise DataError(f"{each}: exists already; remove it or choose another name")
        self._moves = [(each.with_name(f".{each.name}.tmp"), each) for each in outputs]
        self._files = [open(temporary, "wb") for temporary, _ in self._moves]  # noqa: SIM115 (closed by __exit__)
        self._num_documents = self._num_tokens = 0
        if path.suffix == ".npy":
            self._files[0].write(self._npy_header())

    def write(self, ids: NDArray[np.int64]) -> None:
        """Append a document.

        Raises:
            DataError: an id does not fit the dtype, or the separator is inside the document.
        """
        if self._separator is not None and not self._has_ends:
            if (ids[:-1] == self._separator).any():
                raise DataError(
                    f"{self.path}: document {self._num_documents} has the separator {self._separator} inside, where it "
                    "would be cut; choose another --separator, or write NAME.ds"
                )
            if not len(ids) or ids[-1] != self._separator:
                ids = np.append(ids, self._separator)
        limits = np.iinfo(self.dtype)
        if len(ids) and not (limits.min <= int(ids.min()) and int(ids.max()) <= limits.max):
            raise DataError(
                f"{self.path}: document {self._num_documents} has ids that {self.dtype.name} cannot hold; give a "
                "larger --dtype"
            )
        self._files[0].write(ids.astype(self.dtype).tobytes())
        self._num_documents += 1
        self._num_tokens += len(ids)
        if self._has_ends:
            self._files[1].write(np.array([self._num_tokens], dtype="<u8").tobytes())

    def _npy_header(self) -> bytes:
        """A header of fixed size, so that the number of tokens can be filled in at the end."""
        text = f"{{'descr': '{self.dtype.str}', 'fortran_order': False, 'shape': ({self._num_tokens},), }}"
        size = _NPY_HEADER_BYTES - len(_NPY_MAGIC) - 2
        return _NPY_MAGIC + size.to_bytes(2, "little") + text.encode("latin1").ljust(size - 1) + b"\n"

    def __enter__(self) -> ArrayWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None and self.path.suffix == ".npy":
            self._files[0].seek(0)
            self._files[0].write(self._npy_header())
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        if kind is None and self._has_ends:
            # As datatrove writes it; the width of a token is what readers need.
            self._metadata.write_text(f"unknown|{self.dtype.itemsize}\n{self._num_tokens}\n")
        # The ends first: a .ds without them would be one document.
        for temporary, target in reversed(self._moves):
            if kind is None:
                os.replace(temporary, target)
            else:
                temporary.unlink()
