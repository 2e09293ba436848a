"""Opens files of documents of any format by what they are, and streams their documents."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from internlm.data.documents.document_file import DocumentFile, FileFormat
from internlm.data.documents.found_kinds import describe_found, identify, is_tokenized_without_meta
from internlm.data.megatron_files.file_format import MEGATRON
from internlm.data.megatron_files.reader import MegatronFile, index_path
from internlm.data.token_arrays.file_format import ArrayFormat
from internlm.data.tokenized_files.file_format import TOKENIZED
from internlm.data.tokenized_files.writer import meta_path
from internlm.data.tools.parquet_documents import read_parquet
from internlm.utils.errors import DataError
from internlm.utils.folder_walk import walk_links

PARQUET = "parquet"
INPUT_FORMATS = ("tokenized", "megatron", "arrays", PARQUET)
_SUFFIXES = (".bin", ".npy", ".ds", ".parquet")


@dataclass(frozen=True)
class Document:
    """A document on its way from one file to another.

    Attributes:
        ids: int64 [n].
        loss_mask: bool [n]; False where a token contributes no loss.
        sequence_lengths: token counts of its sequences, if it is of a Megatron dataset.
    """

    ids: NDArray[np.int64]
    loss_mask: NDArray[np.bool_]
    sequence_lengths: Sequence[int] | None = None


@dataclass(frozen=True)
class Inputs:
    """Files of one format.

    Attributes:
        paths: at least one, in the order in which they were named; those of a folder sorted.
        format_name: one of `INPUT_FORMATS`.
        format: None for parquet, which has no random access.
        type_names: the first-level folder of each path, or the name of its folder.
    """

    paths: tuple[Path, ...]
    format_name: str
    format: FileFormat | None
    type_names: tuple[str, ...]

    def open(self, path: Path, vocab_size: int | None = None) -> DocumentFile:
        """Open a file for random access.

        Raises:
            DataError: it is malformed, or parquet.
        """
        if self.format is None:
            raise DataError(f"{path}: parquet has no random access; convert it first: internlm data convert")
        return self.format.open(path, vocab_size)

    def documents(self) -> Iterator[Document]:
        """Read all documents in order, one at a time.

        Raises:
            DataError: a document is malformed.
        """
        for path in self.paths:
            if self.format is None:
                yield from _documents_of_parquet(path)
            else:
                file = self.format.open(path)
                for number in range(len(file)):
                    yield read_document(file, number)


def _documents_of_parquet(path: Path) -> Iterator[Document]:
    for row, (ids, loss_mask) in enumerate(read_parquet(path)):
        if int(ids.min(initial=0)) < 0:
            raise DataError(
                f"{path}: row {row}: token {int(ids.min())} is below 0; mark tokens without loss in a column "
                "loss_mask, or in labels with -100"
            )
        yield Document(ids, loss_mask)


def read_document(file: DocumentFile, number: int) -> Document:
    """Read a whole document.

    Raises:
        DataError: it is malformed.
    """
    ids, loss_mask = file.read(number)
    lengths = file.sequence_lengths(number).tolist() if isinstance(file, MegatronFile) else None
    return Document(ids, loss_mask, lengths)


def open_inputs(
    names: Sequence[Path], format_name: str | None = None, dtype: str | None = None, separator: int | None = None
) -> Inputs:
    """Find the files of documents that `names` are or contain.

    Args:
        names: files, or folders that are searched recursively.
        format_name: one of `INPUT_FORMATS`; None detects it by the suffix, and .bin by the
            .bin.meta or .idx beside it.
        dtype, separator: of arrays, see `TokenArray`.

    Raises:
        DataError: a name does not exist, there is no such file, there are files of several formats, or a file is named
            more than once.
    """
    found = [pair for name in names for pair in _files_of(name)]
    seen: set[str] = set()
    for path, _ in found:
        # Links to a file are files of their own.
        place = os.path.abspath(path)
        if place in seen:
            raise DataError(
                f"{path} is named more than once, and its documents would be repeated: remove it, or a folder that "
                "contains it, from the inputs"
            )
        seen.add(place)
    by_format: dict[str, list[tuple[Path, str]]] = {}
    for path, type_name in found:
        by_format.setdefault(format_name or detect_format(path), []).append((path, type_name))
    if not by_format:
        there = "; ".join(filter(None, map(describe_found, names)))
        raise DataError(
            f"{', '.join(map(str, names))}: no file of documents ({', '.join(_SUFFIXES)})"
            + (f". {there}" if there else "")
        )
    if len(by_format) > 1:
        if dtype is None and "arrays" in by_format:
            # A .bin that lacks the file beside it is no array, and this says so.
            ArrayFormat().open(by_format["arrays"][0][0])
        examples = "; ".join(f"{name}: {pairs[0][0]}" for name, pairs in by_format.items())
        raise DataError(f"files of several formats ({examples}): name files of one, or give the format with --from")
    ((chosen, pairs),) = by_format.items()
    formats: dict[str, FileFormat] = {
        "tokenized": TOKENIZED,
        "megatron": MEGATRON,
        "arrays": ArrayFormat(dtype, separator),
    }
    paths, type_names = zip(*pairs, strict=True)
    return Inputs(paths, chosen, formats.get(chosen), type_names)


def detect_format(path: Path) -> str:
    """The format of a file, by its suffix and the files beside it."""
    if path.suffix == ".parquet":
        return PARQUET
    if path.suffix == ".bin" and (meta_path(path).is_file() or _is_lines(path)):
        return "tokenized"
    return "megatron" if path.suffix == ".bin" and index_path(path).is_file() else "arrays"


def _is_lines(path: Path) -> bool:
    return not index_path(path).is_file() and is_tokenized_without_meta(path)


def _files_of(name: Path) -> list[tuple[Path, str]]:
    """(file, type name) of each file that `name` is or contains."""
    if name.is_file():
        kind = identify(name) if name.suffix not in _SUFFIXES else None
        if kind is not None:
            raise DataError(f"{name}: {kind.what}, not a file of documents ({', '.join(_SUFFIXES)}); {kind.advice}")
        return [(name, name.resolve().parent.name)]
    if not name.is_dir():
        named = (name.with_name(name.name + suffix) for suffix in _SUFFIXES if name.name)
        prefix = next((each for each in named if each.is_file()), None)
        if prefix is not None:
            return [(prefix, prefix.resolve().parent.name)]
        raise DataError(f"{name}: no such file or folder")
    found = []
    for folder, subfolders, files in walk_links(name):
        subfolders[:] = [each for each in subfolders if not each.startswith(".")]
        for file in files:
            if file.endswith(_SUFFIXES) and not file.startswith("."):
                parts = Path(folder, file).relative_to(name).parts
                found.append((Path(folder, file), parts[0] if len(parts) > 1 else name.resolve().name))
    return sorted(found)
