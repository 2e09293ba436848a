"""Writes Megatron's indexed datasets; see `internlm.data.megatron_files.reader` for the format."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from internlm.data.megatron_files.reader import DTYPES, HEADER, MAGIC, VERSION, index_path
from internlm.utils.errors import DataError

_CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
_LARGEST_LENGTH = np.iinfo(np.int32).max


def smallest_dtype(vocab_size: int) -> np.dtype[np.integer]:
    """The dtype in which Megatron's own tool writes the ids of a vocabulary: uint16 below 65,500 ids, else int32."""
    return np.dtype(np.uint16) if vocab_size < 65_500 else np.dtype(np.int32)


class MegatronWriter:
    """Writes documents of one sequence each, in a context; the files get their names when it ends without an error.

    Args:
        path: of the .bin.
        dtype: of the tokens.

    Raises:
        DataError: a file exists already.
    """

    def __init__(self, path: Path, dtype: np.dtype[np.integer]) -> None:
        self.path, self.dtype = path, np.dtype(dtype)
        self._lengths: list[int] = []
        for each in (path, index_path(path)):
            if each.exists():
                raise DataError(f"{each}: exists already; remove it or choose another name")
        self._temporary = path.with_name(f".{path.name}.tmp")
        self._file = open(self._temporary, "wb")  # noqa: SIM115 (closed by __exit__)

    def write(self, tokens: Sequence[int]) -> None:
        """Append a document.

        Raises:
            DataError: an id does not fit the dtype, or the document is too long for the format.
        """
        ids = np.asarray(tokens, dtype=np.int64)
        limits = np.iinfo(self.dtype)
        if len(ids) and not (limits.min <= int(ids.min()) and int(ids.max()) <= limits.max):
            raise DataError(f"{self.path}: document {len(self._lengths)} has ids that {self.dtype} cannot hold")
        if len(ids) > _LARGEST_LENGTH:
            raise DataError(f"{self.path}: document {len(self._lengths)} has {len(ids):,} tokens: above 2^31")
        self._file.write(ids.astype(self.dtype).tobytes())
        self._lengths.append(len(ids))

    def __enter__(self) -> MegatronWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is not None:
            self._temporary.unlink()
            return
        index = index_path(self.path)
        temporary = index.with_name(f".{index.name}.tmp")
        lengths = np.asarray(self._lengths, dtype=np.int32)
        offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize))[: len(lengths)]
        with open(temporary, "wb") as file:
            file.write(HEADER.pack(MAGIC, VERSION, _CODES[self.dtype], len(lengths), len(lengths) + 1))
            file.write(lengths.tobytes())
            file.write(offsets.astype(np.int64).tobytes())
            file.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())
        # The index last: a .bin without its index is refused, an index without its .bin would be too.
        os.replace(self._temporary, self.path)
        os.replace(temporary, index)
