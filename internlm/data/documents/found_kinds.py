"""Tells what a file is that was given in place of another, by its name, the files beside it and its first bytes.

For messages: what was found, and the key or command that reads it.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from internlm.data.remote.local_file import head_file
from internlm.data.rows.open_rows import row_format
from internlm.data.tokenize.input_files import RECORD_SUFFIX, is_tokenizer_record

_LINE_STARTS = (b'{"tokens":', b'{"tokens" :')
_MAX_FILES = 10_000
_COMPANIONS = {".meta": ("index", "tokenized file"), ".idx": ("index", "Megatron dataset")}
_BESIDE_DS = (".index", ".metadata", ".loss")


@dataclass(frozen=True)
class FoundKind:
    """The kind of a file.

    Attributes:
        what: a noun phrase.
        type: `data.type` that reads it; None for a file that belongs to another one.
        advice: what to do with it, a clause.
    """

    what: str
    type: str | None
    advice: str


def identify(path: Path) -> FoundKind | None:
    """The kind of a file; None if it is not known."""
    owner = _owner(path)
    if owner is not None:
        what, belongs_to = owner
        there = f"name {belongs_to}" if belongs_to.is_file() else f"copy {belongs_to.name} beside it, and name that"
        return FoundKind(what, None, there)
    if row_format(path) is not None:
        return FoundKind(
            "text or rows",
            "streaming",
            "train on it with data.type = 'streaming', or tokenize it: internlm data tokenize "
            f"{path} --tokenizer TOKENIZER --output NAME.bin",
        )
    if path.suffix in (".npy", ".ds"):
        return FoundKind("an array of token ids", "arrays", "set data.type = 'arrays'")
    return _identify_bin(path) if path.suffix == ".bin" else None


def _owner(path: Path) -> tuple[str, Path] | None:
    """(what a companion is, the file that it belongs to)."""
    if path.suffix in _COMPANIONS:
        role, of = _COMPANIONS[path.suffix]
        return f"the {role} of a {of}", path.with_suffix(".bin" if path.suffix == ".idx" else "")
    if path.suffix in _BESIDE_DS and path.with_suffix("").suffix == ".ds":
        return "a file beside an array of datatrove", path.with_suffix("")
    if is_tokenizer_record(path):
        return "the record of the tokenizer of a file", path.with_name(path.name.removesuffix(RECORD_SUFFIX))
    return None


def _identify_bin(path: Path) -> FoundKind:
    if path.with_name(path.name + ".meta").is_file():
        return FoundKind("a tokenized file", "tokenized", "set data.type = 'tokenized'")
    if path.with_suffix(".idx").is_file():
        return FoundKind("a Megatron dataset", "megatron", "set data.type = 'megatron'")
    if is_tokenized_without_meta(path):
        return FoundKind(
            f"a tokenized file without its {path.name}.meta",
            "tokenized",
            f"rebuild the .meta: python tools/tokenizer.py --rebuild-meta {path}",
        )
    return FoundKind(
        "binary data without a .meta (tokenized file) or .idx (Megatron dataset) beside it",
        "arrays",
        "copy the missing file beside it, or, if it is an array of token ids (nanoGPT, OLMo, llm.c), set data.type = "
        "'arrays' and data.array_dtype",
    )


def is_tokenized_without_meta(path: Path) -> bool:
    """Whether the lines of a .bin are those of a tokenized file, and its .meta is missing."""
    if path.with_name(path.name + ".meta").is_file():
        return False
    with open(head_file(path), "rb") as file:
        return file.read(max(map(len, _LINE_STARTS))).startswith(_LINE_STARTS)


def describe_found(path: Path, *, but: str | None = None) -> str:
    """A sentence, without its period, about what a file is, or what the first known file in a folder is.

    Args:
        path: file or folder.
        but: `data.type` that is not named, because it is the one that was expected.

    Returns:
        Empty if nothing is known.
    """
    if not path.is_dir():
        found = identify(path) if path.is_file() else None
        return "" if found is None or found.type == but else f"It is {found.what}: {found.advice}"
    for each in itertools.islice(_files_below(path), _MAX_FILES):
        found = identify(each)
        if found is not None and found.type not in (None, but):
            advice = (
                found.advice.replace(str(each), str(path)).replace("on it", "on them").replace("ize it", "ize them")
            )
            return f"It has {each.relative_to(path)}, {found.what}: {advice}"
    return "" if any(path.iterdir()) else "It is empty"


def _files_below(folder: Path) -> Iterator[Path]:
    for place, subfolders, names in os.walk(folder):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield from (Path(place, name) for name in sorted(names) if not name.startswith("."))
