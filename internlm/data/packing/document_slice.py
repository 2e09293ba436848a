"""Slices of documents with their labels: what samples are packed from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from internlm.data.batch import IGNORE_INDEX
from internlm.data.images.image_source import ImageSource


@dataclass
class DocumentSlice:
    """Consecutive tokens of one document, with their labels.

    Attributes:
        input_ids: int64 [n].
        labels: int64 [n].
        unreadable: why the document could not be read; the slice is then padding.
        is_truncated_answer: whether truncation at seq_len removed all labels of the document.
        is_padding: whether it is padding between documents.
        images: the pictures of the document, which is then not cut.
    """

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    unreadable: str | None = None
    is_truncated_answer: bool = False
    is_padding: bool = False
    images: tuple[ImageSource, ...] = ()

    @property
    def has_text(self) -> bool:
        """Whether the slice has tokens of a document, not padding alone."""
        return len(self.input_ids) > 0 and self.unreadable is None and not self.is_padding


def make_slice(ids: NDArray[np.int64], loss_mask: NDArray[np.bool_], length: int) -> DocumentSlice:
    """Label the first `length` tokens of `ids` with the next token of the document.

    Args:
        ids: int64 [length + 1], or [length] at the end of the document, whose last label is `IGNORE_INDEX`.
        loss_mask: bool, of the same shape; False where a token is never a label.
    """
    labels = np.full(length, IGNORE_INDEX, dtype=np.int64)
    following = np.where(loss_mask[1:], ids[1:], IGNORE_INDEX)
    labels[: len(following)] = following
    return DocumentSlice(ids[:length], labels)


def unreadable_slice(length: int, reason: str) -> DocumentSlice:
    """`length` tokens of padding in place of a document that cannot be read."""
    return replace(padding_slice(length), unreadable=reason, is_padding=False)


def padding_slice(length: int) -> DocumentSlice:
    """`length` tokens of padding."""
    return DocumentSlice(
        np.zeros(length, dtype=np.int64), np.full(length, IGNORE_INDEX, dtype=np.int64), is_padding=True
    )


def join_slices(slices: Sequence[DocumentSlice]) -> DocumentSlice:
    """Join consecutive slices of one document that were read together."""
    if len(slices) == 1:
        return slices[0]
    return DocumentSlice(
        np.concatenate([each.input_ids for each in slices]), np.concatenate([each.labels for each in slices])
    )
