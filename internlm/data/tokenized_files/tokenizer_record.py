"""Records which tokenizer made a tokenized file, in `NAME.bin.tokenizer.json` beside `NAME.bin`.

Owns the record and the comparison of two records. InternEvo's reader, which finds files by the suffix .bin, ignores it.
Imports no tokenizer library.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from internlm import __version__
from internlm.data.documents.document_file import FileFormat
from internlm.data.documents.folders import find_valid_sets
from internlm.data.tokenize.fingerprint import tokenizer_fingerprint
from internlm.data.tokenize.text_tokenizer import TextTokenizer
from internlm.data.tokenized_files.file_format import TOKENIZED
from internlm.utils.errors import DataError

_SUFFIX = ".tokenizer.json"


@dataclass(frozen=True)
class TokenizerRecord:
    """The tokenizer of one tokenized file.

    Attributes:
        fingerprint: hash of the ids that the tokenizer produces; see `tokenizer_fingerprint`.
        tokenizer: absolute path of its file or folder.
        vocab_size: all ids are smaller.
        bos_id, eos_id: ids of the bos and eos tokens; None if the tokenizer has none.
        add_bos, add_eos: whether documents start with bos, and end with eos.
        format: "text", or the prompt format of instruction data.
        version: version of this package that wrote the file.
        created: UTC time, ISO 8601.
    """

    fingerprint: str
    tokenizer: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    add_bos: bool
    add_eos: bool
    format: str = "text"
    version: str = __version__
    created: str = ""

    @classmethod
    def of(
        cls, tokenizer: TextTokenizer, path: Path, *, add_bos: bool, add_eos: bool, format: str = "text"
    ) -> TokenizerRecord:
        """Build the record of files made by `tokenizer`, which was loaded from `path`."""
        return cls(
            fingerprint=tokenizer_fingerprint(tokenizer),
            tokenizer=str(path.resolve()),
            vocab_size=tokenizer.vocab_size,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            add_bos=add_bos,
            add_eos=add_eos,
            format=format,
        )

    def differences(self, other: TokenizerRecord) -> list[str]:
        """Describe each difference that changes the ids of a text; empty if there is none."""
        if self.fingerprint != other.fingerprint:
            return [
                f"tokenizer {self.tokenizer} ({self.vocab_size:,} ids, fingerprint {self.fingerprint}) against "
                f"{other.tokenizer} ({other.vocab_size:,} ids, fingerprint {other.fingerprint})"
            ]
        names = ("add_bos", "add_eos", "format", "bos_id", "eos_id")
        return [
            f"{name} {getattr(self, name)} against {getattr(other, name)}"
            for name in names
            if getattr(self, name) != getattr(other, name)
        ]


def record_path(bin_path: Path) -> Path:
    """Path of the record of a .bin file."""
    return bin_path.with_name(bin_path.name + _SUFFIX)


def write_record(bin_path: Path, record: TokenizerRecord) -> None:
    """Write the record of a .bin file, atomically. Call it before the .bin gets its final name."""
    path = record_path(bin_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    values = asdict(record) | {"created": record.created or datetime.now(UTC).isoformat(timespec="seconds")}
    temporary.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_record(bin_path: Path) -> TokenizerRecord | None:
    """Read the record of a .bin file; None if it has none (files of InternEvo, and of version 0.1.0).

    Raises:
        DataError: the record is malformed.
    """
    path = record_path(bin_path)
    if not path.is_file():
        return None
    known = {field.name for field in fields(TokenizerRecord)}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return TokenizerRecord(**{name: value for name, value in values.items() if name in known})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: not a tokenizer record ({error}). Remove it if you know which tokenizer made {bin_path.name}"
        ) from error


def tokenizer_records(folder: str | Path, format: FileFormat = TOKENIZED) -> dict[Path, TokenizerRecord | None]:
    """Read the records of all files of a format at or below a folder, in sorted order; None for a file without one.

    Raises:
        DataError: the folder is missing or has no file of the format, or a record is malformed.
    """
    paths = sorted(path for paths in find_valid_sets(folder, format).values() for path in paths)
    return {path: read_record(path) for path in paths}


def common_record(records: Mapping[Path, TokenizerRecord | None]) -> TokenizerRecord | None:
    """Return the record that all .bin files agree on; None if no file has one.

    Raises:
        DataError: two files were made by different tokenizers; names both.
    """
    known = [(path, record) for path, record in records.items() if record is not None]
    for path, record in known[1:]:
        if record.fingerprint != known[0][1].fingerprint:
            raise DataError(
                f"{known[0][0]} and {path} were made by different tokenizers: {known[0][1].differences(record)[0]}. "
                "A model learns the ids of one tokenizer: tokenize all files with the same one"
            )
    return known[0][1] if known else None
