"""Documents held out of training: the last ones in the shuffled order of each file.

The shuffle depends neither on the seed of the run nor on packing, so every run with the same fraction holds out the
same documents, and a smaller fraction holds out some of those of a larger one. Training reads the others.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from internlm.data.documents.document_file import DocumentFile, FileFormat
from internlm.data.documents.document_index import DOCUMENT_SEED
from internlm.data.images.document_images import DocumentsWithImages
from internlm.data.images.image_source import ImageSource
from internlm.data.permutation import permute

_MAX_OPEN_FILES = 64


def num_held_out(num_documents: int, fraction: float, path: Path, folder: str | Path) -> int:
    """Number of held-out documents of a file.

    fraction * num_documents is rounded up or down by a hash of the file's name, so that many files with few documents
    have the fraction together. It depends on no other file.

    Args:
        num_documents: documents of the file, of any length.
        fraction: in [0, 1).
        path: of the file.
        folder: the train folder, or the file itself.
    """
    name = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else ""
    digest = hashlib.sha256((name if name not in ("", ".") else path.name).encode()).digest()
    return min(num_documents, math.floor(fraction * num_documents + int.from_bytes(digest[:8], "big") / 2.0**64))


def held_out_documents(num_documents: int, held_out: int) -> NDArray[np.int64]:
    """The held-out documents of a file, in ascending order: int64 [held_out]."""
    if held_out == 0:
        return np.zeros(0, dtype=np.int64)
    return np.sort(permute(np.arange(num_documents - held_out, num_documents), num_documents, DOCUMENT_SEED))


class OpenFiles:
    """The files of one format that were used last, kept open.

    Args:
        format: of the files.
        vocab_size: ids must be smaller; None accepts any.
    """

    def __init__(self, format: FileFormat, vocab_size: int | None) -> None:
        self.vocab_size = vocab_size
        self._format = format
        self._open: OrderedDict[Path, DocumentFile] = OrderedDict()

    def get(self, path: Path) -> DocumentFile:
        """Return a file, opened now or before.

        Raises:
            DataError: it is missing or malformed.
        """
        if path not in self._open:
            self._open[path] = self._format.open(path, self.vocab_size)
            if len(self._open) > _MAX_OPEN_FILES:
                self._open.popitem(last=False)
        self._open.move_to_end(path)
        return self._open[path]


class DocumentSelection:
    """Some documents of a file, as a `DocumentFile`. Messages have their numbers in the whole file.

    Args:
        path: of the file.
        documents: int64 [n], their numbers.
        files: opens the file when a document is read.

    Raises:
        DataError: the file is missing or malformed.
    """

    def __init__(self, path: Path, documents: NDArray[np.int64], files: OpenFiles) -> None:
        self.path, self.documents = path, documents
        self.inputs: Sequence[Path] = files.get(path).inputs
        chosen = hashlib.sha256(documents.tobytes()).hexdigest()[:16]
        self.reading = f"{files.get(path).reading}-{chosen}"
        self._files = files
        self._counts = files.get(path).counts_of(documents)

    @property
    def vocab_size(self) -> int | None:
        """See `DocumentFile`."""
        return self._files.vocab_size

    def __len__(self) -> int:
        """Number of selected documents."""
        return len(self.documents)

    def counts(self, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        """See `DocumentFile`."""
        return self._counts[start:stop]

    def counts_of(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """See `DocumentFile`."""
        return self._counts[documents]

    def check_offsets(self, start: int, stop: int) -> None:
        """See `DocumentFile`."""
        file = self._files.get(self.path)
        for document in self.documents[start:stop]:
            file.check_offsets(int(document), int(document) + 1)

    def read(
        self, document: int, start: int = 0, stop: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """See `DocumentFile`."""
        return self._files.get(self.path).read(int(self.documents[document]), start, stop)

    def images(self, document: int) -> Sequence[ImageSource]:
        """See `DocumentsWithImages`; none in files without pictures."""
        file = self._files.get(self.path)
        return file.images(int(self.documents[document])) if isinstance(file, DocumentsWithImages) else ()

    @property
    def left_out(self) -> str | None:
        """See `DocumentsWithImages`; of the whole file."""
        file = self._files.get(self.path)
        return file.left_out if isinstance(file, DocumentsWithImages) else None
