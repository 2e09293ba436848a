"""Reads slices of the documents of a file, with labels and fill-in-the-middle. Must not know samples or their index."""

from __future__ import annotations

from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from internlm.data.batch import IGNORE_INDEX
from internlm.data.images.document_images import DocumentsWithImages
from internlm.data.packing.document_slice import DocumentSlice, join_slices, make_slice, unreadable_slice
from internlm.data.packing.fill_in_the_middle import FillInTheMiddle
from internlm.utils.errors import DataError, RemoteDataError


class ReadableDocuments(Protocol):
    """What is needed of a `DocumentFile` to read slices."""

    def counts(self, start: int, stop: int) -> NDArray[np.int64]:
        """See `DocumentFile`."""

    def read(
        self, document: int, start: int = 0, stop: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """See `DocumentFile`."""


class SliceReader:
    """Reads the slices of one sample.

    Args:
        file: of the documents.
        key: what draws of fill-in-the-middle depend on besides seed and document: epoch and number of the file.
        seq_len: maximum length of an attention segment, in tokens.
        is_unpacked: whether a slice is the truncated document, of which the rest is never read.
        skip_bad_documents: replace a document that cannot be read by padding.
        fim: fill-in-the-middle.
    """

    def __init__(
        self,
        file: ReadableDocuments,
        key: tuple[int, ...],
        *,
        seq_len: int,
        is_unpacked: bool,
        skip_bad_documents: bool,
        fim: FillInTheMiddle | None,
    ) -> None:
        self._file, self._key, self._seq_len = file, key, seq_len
        self._is_unpacked, self._skip_bad_documents, self._fim = is_unpacked, skip_bad_documents, fim

    def read(self, document: int, start: int, stop: int, column: int = 0) -> DocumentSlice:
        """Read tokens [start, stop) of a document with their labels, transformed by fill-in-the-middle.

        Args:
            document: its index in the file.
            start: first token.
            stop: token after the last; the end of the document if that is before.
            column: tokens before the slice in its attention segment.

        Raises:
            DataError: the document is malformed, and bad documents are not skipped.
        """
        count = int(self._file.counts(document, document + 1)[0])
        stop = min(stop, count)
        try:
            result = self._read(document, start, stop, column)
            if isinstance(self._file, DocumentsWithImages):
                result.images = tuple(self._file.images(document))
            if self._is_unpacked and stop < count and (result.labels == IGNORE_INDEX).all():
                result.is_truncated_answer = bool(self._file.read(document, stop + 1)[1].any())
        except DataError as error:
            if not self._skip_bad_documents or isinstance(error, RemoteDataError):
                raise
            return unreadable_slice(0 if self._is_unpacked else stop - start, str(error))
        return result

    def _read(self, document: int, start: int, stop: int, column: int) -> DocumentSlice:
        if self._fim is not None and self._fim.level == "document":
            ids, loss_mask = self._file.read(document)
            ids, loss_mask = self._fim.transform(ids, loss_mask, *self._key, document) or (ids, loss_mask)
            return make_slice(ids[start : stop + 1], loss_mask[start : stop + 1], stop - start)
        # One more token, if the document has it: the label at a cut is the next token of the document.
        ids, loss_mask = self._file.read(document, start, stop + 1)
        length = stop - start
        if self._fim is None:
            return make_slice(ids, loss_mask, length)
        borders = [0, *range(self._seq_len - column, length, self._seq_len), length]
        parts = []
        for first, last in pairwise(borders):
            changed = self._fim.transform(ids[first:last], loss_mask[first:last], *self._key, document, start + first)
            # The end of a transformed part is the end of its middle, which no token follows.
            part, mask_of_part = changed or (ids[first : last + 1], loss_mask[first : last + 1])
            parts.append(make_slice(part, mask_of_part, last - first))
        return join_slices(parts)
