"""The format of arrays of token ids (.npy, raw integers, datatrove's .ds), as `DocumentFile`s."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from internlm.data.token_arrays.reader import TokenArray


@dataclass(frozen=True)
class ArrayFormat:
    """See `FileFormat` and doc/data.md.

    Attributes:
        dtype, separator: see `TokenArray`.
    """

    dtype: str | None = None
    separator: int | None = None

    name: ClassVar[str] = "arrays"
    suffixes: ClassVar[tuple[str, ...]] = (".npy", ".bin", ".ds")
    hint: ClassVar[str] = "Expected .npy arrays of ids, raw .bin files (nanoGPT, OLMo), or datatrove's .ds"

    def companions(self, name: str) -> Sequence[str]:
        return tuple(name + suffix for suffix in (".index", ".metadata", ".loss", ".tokenizer.json"))

    def open(self, path: Path, vocab_size: int | None = None) -> TokenArray:
        return TokenArray(path, vocab_size, dtype=self.dtype, separator=self.separator)
