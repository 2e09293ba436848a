"""Writes Megatron's indexed datasets; see `internlm.data.megatron_files.reader` for the format."""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from internlm.data.megatron_files.reader import DTYPES, HEADER, MAGIC, VERSION, index_path
from internlm.utils.errors import DataError

_CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
_LARGEST_LENGTH = np.iinfo(np.int32).max


def smallest_dtype(vocab_size: int) -> np.dtype[np.integer]:
    """The dtype in which Megatron's own tool writes the ids of a vocabulary: uint16 below 65,500 ids, else int32."""
    return np.dtype(np.uint16) if vocab_size < 65_500 else np.dtype(np.int32)


class MegatronWriter:
    """Writes documents in a context; the files get their names when it ends without an error.

    Args:
        path: of the .bin.
        dtype: of the tokens.

    Raises:
        DataError: a file exists already.
    """

    def __init__(self, path: str | Path, dtype: np.dtype[np.integer]) -> None:
        self.path = path = Path(path)
        self.dtype = np.dtype(dtype)
        if self.path.suffix != ".bin":
            raise DataError(f"{self.path}: a Megatron dataset must be named *.bin")
        # Arrays of machine integers, of which 10^8 fit into memory.
        self._lengths, self._bounds = array("i"), array("q", [0])
        for each in (path, index_path(path)):
            if each.exists():
                raise DataError(f"{each}: exists already; remove it or choose another name")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = path.with_name(f".{path.name}.tmp")
        self._file = open(self._temporary, "wb")  # noqa: SIM115 (closed by __exit__)

    def write(self, tokens: Sequence[int] | NDArray[np.int64], sequence_lengths: Sequence[int] | None = None) -> None:
        """Append a document.

        Args:
            tokens: of all its sequences.
            sequence_lengths: token counts of its sequences; None: it is one sequence.

        Raises:
            DataError: an id does not fit the dtype, or the document is too long for the format.
        """
        ids = np.asarray(tokens, dtype=np.int64)
        lengths = [len(ids)] if sequence_lengths is None else [int(length) for length in sequence_lengths]
        limits, document = np.iinfo(self.dtype), len(self._bounds) - 1
        if sum(lengths) != len(ids):
            raise ValueError(f"{sum(lengths)} tokens by sequence_lengths, but {len(ids)} tokens")
        if len(ids) and not (limits.min <= int(ids.min()) and int(ids.max()) <= limits.max):
            raise DataError(
                f"{self.path}: document {document} has ids that {self.dtype} cannot hold; give a larger --dtype"
            )
        if max(lengths, default=0) > _LARGEST_LENGTH:
            raise DataError(f"{self.path}: document {document} has {max(lengths):,} tokens: above 2^31")
        self._file.write(ids.astype(self.dtype).tobytes())
        self._lengths.extend(lengths)
        self._bounds.append(len(self._lengths))

    def __enter__(self) -> MegatronWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self._file.close()
            self._temporary.unlink()
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        index = index_path(self.path)
        temporary = index.with_name(f".{index.name}.tmp")
        lengths = np.asarray(self._lengths, dtype=np.int32)
        offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize))[: len(lengths)]
        with open(temporary, "wb") as file:
            file.write(HEADER.pack(MAGIC, VERSION, _CODES[self.dtype], len(lengths), len(self._bounds)))
            file.write(lengths.tobytes())
            file.write(offsets.astype(np.int64).tobytes())
            file.write(np.asarray(self._bounds, dtype=np.int64).tobytes())
            file.flush()
            os.fsync(file.fileno())
        # The index last: a .bin without its index is refused, an index without its .bin would be too.
        os.replace(self._temporary, self.path)
        os.replace(temporary, index)
