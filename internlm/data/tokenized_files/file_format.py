"""The format of tokenized files, `NAME.bin` with `NAME.bin.meta`, as `DocumentFile`s."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from internlm.data.tokenized_files.reader import TokenizedFile


class TokenizedFormat:
    """See `FileFormat` and doc/data.md."""

    name = "tokenized"
    suffixes = (".bin",)
    hint = "Make tokenized files with tools/tokenizer.py"

    def companions(self, name: str) -> Sequence[str]:
        return f"{name}.meta", f"{name}.tokenizer.json"

    def open(self, path: Path, vocab_size: int | None = None) -> TokenizedFile:
        return TokenizedFile(path, vocab_size)


TOKENIZED = TokenizedFormat()
