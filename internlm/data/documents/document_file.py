"""The protocol of a file of tokenized documents, whatever its format.

A format is a reader with this protocol and a `FileFormat`. What is done with documents (the shuffle, packing,
validation, checks) knows no format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class DocumentFile(Protocol):
    """Random access to the documents of one file.

    Attributes:
        path: the file that messages name.
        inputs: the files that the documents depend on; an index built from other versions of them is not used.
        reading: settings of the reader that the documents depend on, as a text; neither is one built with others.
        vocab_size: ids must be smaller; checked when a document is read. None accepts any.
    """

    @property
    def path(self) -> Path: ...

    @property
    def inputs(self) -> Sequence[Path]: ...

    @property
    def reading(self) -> str: ...

    @property
    def vocab_size(self) -> int | None: ...

    def __len__(self) -> int:
        """Number of documents in the file."""

    def counts(self, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        """Token counts of the documents [start, stop): int64 [stop - start]."""

    def counts_of(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Token counts of the given documents: int64 of the same shape."""

    def check_offsets(self, start: int, stop: int) -> None:
        """Check that the documents [start, stop) are inside the file.

        Raises:
            DataError: one is not; names the first.
        """

    def read(
        self, document: int, start: int = 0, stop: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Read tokens [start, stop) of a document.

        Returns:
            (ids int64, loss_mask bool), both [stop - start]; the mask is False where a token contributes no loss.

        Raises:
            DataError: the document is malformed, or has an id outside the vocabulary.
        """


class FileFormat(Protocol):
    """A format of files of tokenized documents. Sent to worker processes.

    Attributes:
        name: the config's `data.type`.
        suffixes: endings of the names of files with documents.
        hint: how to make such files, a sentence without its period, for messages.
    """

    @property
    def name(self) -> str: ...

    @property
    def suffixes(self) -> tuple[str, ...]: ...

    @property
    def hint(self) -> str: ...

    def companions(self, name: str) -> Sequence[str]:
        """Names of further files that belong to the file `name` and are beside it, if they exist."""

    def open(self, path: Path, vocab_size: int | None = None) -> DocumentFile:
        """Open a file.

        Raises:
            DataError: it is missing or malformed.
        """


@dataclass(frozen=True)
class TypedFile:
    """A file of documents, and the index of its dataset type."""

    path: Path
    type_id: int
