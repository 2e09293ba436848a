"""The format of Megatron's indexed datasets, `NAME.bin` with `NAME.idx`, as `DocumentFile`s."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from internlm.data.megatron_files.reader import MegatronFile, index_path


class MegatronFormat:
    """See `FileFormat` and doc/data.md."""

    name = "megatron"
    suffixes = (".bin",)
    hint = "Make Megatron datasets with Megatron's tools/preprocess_data.py"

    def companions(self, name: str) -> Sequence[str]:
        return index_path(Path(name)).name, f"{name}.tokenizer.json"

    def open(self, path: Path, vocab_size: int | None = None) -> MegatronFile:
        return MegatronFile(path, vocab_size)


MEGATRON = MegatronFormat()
