"""Validation sets: named lists of files of documents, in folders of their own or held out of a train folder.

A set of another kind is a class with the protocol `ValidSet`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from internlm.data.documents.document_file import DocumentFile, FileFormat
from internlm.data.documents.document_index import summarize
from internlm.data.documents.folders import find_train_files, find_valid_sets, min_length_of_type
from internlm.data.documents.held_out import DocumentSelection, OpenFiles, held_out_documents, num_held_out
from internlm.utils.errors import DataError

HELD_OUT = "held_out"
"""Name of the set of held-out documents, and beginning of the names of such sets by type."""


class ValidSet(Protocol):
    """A validation set.

    Attributes:
        name: of the set, in metrics.
        place: folder or file that messages name.
        origin: config key that names the set, for messages.
    """

    @property
    def name(self) -> str: ...

    @property
    def place(self) -> str: ...

    @property
    def origin(self) -> str: ...

    @property
    def paths(self) -> Sequence[Path]:
        """Files of the set."""

    def open(self, vocab_size: int | None) -> list[DocumentFile]:
        """Open the files, and check that their documents are inside them.

        Args:
            vocab_size: ids must be smaller; None accepts any.

        Raises:
            DataError: a file is missing or malformed.
        """


@dataclass(frozen=True)
class FileSet:
    """All documents of some files; see `ValidSet`."""

    name: str
    paths: Sequence[Path]
    format: FileFormat
    origin: str = field(default="data.valid_folder", kw_only=True)

    @property
    def place(self) -> str:
        """See `ValidSet`."""
        return str(self.paths[0].parent)

    def open(self, vocab_size: int | None) -> list[DocumentFile]:
        """See `ValidSet`."""
        files = [self.format.open(path, vocab_size) for path in self.paths]
        for file in files:
            summarize(file, 0)
        return files


@dataclass(frozen=True)
class HeldOutSet:
    """Documents of a train folder that training does not read; see `ValidSet`.

    Attributes:
        folder: the train folder.
        fraction: see `num_held_out`.
        min_length: minimum number of tokens of a document, as in training.
    """

    name: str
    paths: Sequence[Path]
    format: FileFormat
    folder: str
    fraction: float
    min_length: int
    origin: str = field(default="data.valid_fraction", kw_only=True)

    @property
    def place(self) -> str:
        """See `ValidSet`."""
        return self.folder

    def open(self, vocab_size: int | None) -> list[DocumentFile]:
        """See `ValidSet`."""
        opened, selections = OpenFiles(self.format, vocab_size), []
        for path in self.paths:
            file = opened.get(path)
            summarize(file, self.min_length)
            documents = held_out_documents(len(file), num_held_out(len(file), self.fraction, path, self.folder))
            documents = documents[file.counts_of(documents) >= max(1, self.min_length)]
            if len(documents):
                selections.append(DocumentSelection(path, documents, opened))
        if not selections:
            raise DataError(
                f"{self.folder}: data.valid_fraction = {self.fraction} holds out no document of at least "
                f"{max(1, self.min_length)} tokens for the validation set '{self.name}'; give a larger fraction"
            )
        return list(selections)


def folder_sets(folder: str | Path, format: FileFormat) -> list[ValidSet]:
    """The sets of a validation folder; see `find_valid_sets`."""
    return [FileSet(name, paths, format) for name, paths in find_valid_sets(folder, format).items()]


def named_set(name: str, folder: str | Path, format: FileFormat) -> ValidSet:
    """One set of all files of a format at or below a folder, or of one file.

    Raises:
        DataError: the folder is missing or has no such file.
    """
    paths = sorted(path for paths in find_valid_sets(folder, format).values() for path in paths)
    return FileSet(name, paths, format, origin=f"data.valid_folder['{name}']")


def held_out_sets(
    folder: str | Path, format: FileFormat, fraction: float, min_length: int, by_type: Mapping[str, int] | None
) -> list[ValidSet]:
    """The held-out documents of a train folder: one set for each type, or one for all if there is one type.

    Args:
        folder: see `find_train_files`.
        format: of its files.
        fraction: see `num_held_out`.
        min_length: minimum number of tokens; shorter documents are dropped.
        by_type: type name -> minimum that replaces `min_length` for that type.

    Raises:
        DataError: the folder is missing or malformed.
    """
    files, type_names = find_train_files(folder, format)
    sets: list[ValidSet] = []
    used = sorted({file.type_id for file in files})
    for type_id in used:
        name = HELD_OUT if len(used) == 1 else f"{HELD_OUT}/{type_names[type_id]}"
        members = [file for file in files if file.type_id == type_id]
        limit = min_length_of_type(type_names[type_id], folder, type_names, min_length, by_type)
        paths = [file.path for file in members]
        sets.append(HeldOutSet(name, paths, format, str(folder), fraction, limit))
    return sets
