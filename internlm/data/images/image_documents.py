"""Tokenized files whose documents have pictures: placeholders in the tokens, and where the pictures are in the line.

Lines are `{"tokens": [...], "images": [...]}` (InternEvo's format), read by the reader of tokenized files. Documents
with pictures that are longer than a sequence count as empty, so packing and evaluation leave them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from internlm.data.documents.index_cache import cached_or_built_array
from internlm.data.images.image_source import ImageSource, from_json
from internlm.data.images.settings import ImageSettings
from internlm.data.tokenized_files.file_format import TOKENIZED
from internlm.data.tokenized_files.reader import TokenizedFile


class ImageDocuments:
    """See `DocumentFile` and `DocumentsWithImages`.

    Args:
        file: the tokenized file.
        settings: of the placeholders.
    """

    def __init__(self, file: TokenizedFile, settings: ImageSettings) -> None:
        self._file, self._settings = file, settings
        self.path, self.vocab_size = file.path, file.vocab_size
        self.inputs: Sequence[Path] = file.inputs
        self.reading = f"{file.reading}-images-up-to-{settings.seq_len}"

    @cached_property
    def _too_long(self) -> NDArray[np.int64]:
        """Documents with pictures that are too long, ascending: int64 [n]."""
        return np.asarray(cached_or_built_array(self, "too-long-with-images", self._write_too_long)[1:])

    @property
    def left_out(self) -> str | None:
        """See `DocumentsWithImages`."""
        if not len(self._too_long):
            return None
        first, longest = self._too_long[0], f"data.seq_len = {self._settings.seq_len:,}"
        return (
            f"{self.path}: {len(self._too_long):,} of {len(self):,} documents are left out, such as document {first}: "
            f"they have pictures and more tokens than {longest}, and documents with pictures are not cut"
        )

    def _write_too_long(self, target: Path) -> None:
        counts = self._file.counts()
        long = np.flatnonzero(counts > self._settings.seq_len)
        found = [document for document in long.tolist() if self._file.read_field(document, "images")]
        # -1: an empty array cannot be mapped.
        with open(target, "wb") as out:
            np.save(out, np.array([-1, *found], dtype=np.int64))

    def __len__(self) -> int:
        """Number of documents in the file."""
        return len(self._file)

    def counts(self, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        """See `DocumentFile`."""
        documents = np.arange(len(self), dtype=np.int64)[start:stop]
        return self.counts_of(documents)

    def counts_of(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """See `DocumentFile`."""
        return np.where(np.isin(documents, self._too_long), 0, self._file.counts_of(documents))

    def check_offsets(self, start: int, stop: int) -> None:
        """See `DocumentFile`."""
        self._file.check_offsets(start, stop)

    def read(
        self, document: int, start: int = 0, stop: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """See `DocumentFile`; placeholders have no loss, and documents that are left out no token."""
        stop = start if document in self._too_long else stop
        ids, loss_mask = self._file.read(document, start, stop)
        return ids, loss_mask & (ids != self._settings.token_id)

    def images(self, document: int) -> list[ImageSource]:
        """See `DocumentsWithImages`."""
        place = f"{self.path}: document {document}"
        values = self._file.read_field(document, "images") or []
        found = [from_json(value, self._settings.folder, place) for value in values]
        self._settings.check_count(self._file.read(document)[0], len(found), place, "groups of placeholders")
        return found


@dataclass(frozen=True)
class ImageDocumentFormat:
    """Tokenized files with pictures, as a `FileFormat`."""

    settings: ImageSettings
    name: str = TOKENIZED.name
    suffixes: tuple[str, ...] = TOKENIZED.suffixes
    hint: str = "Make tokenized files with internlm data tokenize --image-token-id"

    def companions(self, name: str) -> Sequence[str]:
        return TOKENIZED.companions(name)

    def open(self, path: Path, vocab_size: int | None = None) -> ImageDocuments:
        return ImageDocuments(TokenizedFile(path, vocab_size, self.settings.token_id), self.settings)
