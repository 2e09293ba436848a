"""Packs slices of documents into samples; one sample becomes one micro-batch.

Owns attention segments and padding. Must not know files, order or ranks. Samples are numpy arrays, which loader workers
send by value.

Legend of shapes: P = micro_bsz * seq_len tokens of a packed sample, B = micro_bsz, S = seq_len.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from internlm.data.batch import IGNORE_INDEX
from internlm.data.images.image_source import ImageSource
from internlm.data.packing.document_slice import DocumentSlice
from internlm.utils.errors import ConfigError
from internlm.utils.packing_modes import PACKINGS as PACKINGS
from internlm.utils.packing_modes import Packing as Packing
from internlm.utils.packing_modes import default_document_mask, document_mask_problem


def check_document_mask(packing: Packing, document_mask: bool | None) -> bool:
    """The document mask of a source: the given one, or the default of the packing if it is None.

    Raises:
        ConfigError: it contradicts the packing.
    """
    if document_mask is None:
        return default_document_mask(packing)
    if problem := document_mask_problem(packing, document_mask):
        raise ConfigError(problem)
    return document_mask


class PlacedImages(NamedTuple):
    """The pictures of one document of a sample.

    Attributes:
        start, stop: the tokens of the document; in an unpacked sample, row r begins at token r * S.
        sources: of the pictures, in the order of their placeholders.
    """

    start: int
    stop: int
    sources: tuple[ImageSource, ...]


@dataclass
class Sample:
    """The arrays of one micro-batch.

    Attributes:
        input_ids: int64 [P], or [B, S] when unpacked.
        labels: int64 of the same shape.
        lengths: lengths of the attention segments, with sum P; None when unpacked.
        type_ids: the type of all tokens, or int64 of the same shape as the ids.
        num_documents: number of documents, or parts of documents, in the sample.
        row_lengths: tokens of each row without padding; None when packed.
        is_padding: bool of the same shape as the ids: the tokens of no document; None if there are none.
        unreadable: one message for each document that could not be read and was replaced by padding.
        num_truncated_answers: number of documents that lost every label by truncation at seq_len.
        images_at: the documents with pictures, in order; see `internlm.data.images.loading`.
        images: float32 [N, 3, H, W], the pixels of all pictures; None if there are none, or they are not read.
        image_features: int64 of the same shape as the ids; see `image_feature_indices`. None without a vision tower.
        cursor: where its stream continues after it, for a stream that has to remember this; see `SampleStream`.
    """

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    lengths: tuple[int, ...] | None
    type_ids: int | NDArray[np.int64]
    num_documents: int
    row_lengths: tuple[int, ...] | None = None
    is_padding: NDArray[np.bool_] | None = None
    unreadable: tuple[str, ...] = ()
    num_truncated_answers: int = 0
    images_at: tuple[PlacedImages, ...] = ()
    images: NDArray[np.float32] | None = None
    image_features: NDArray[np.int64] | None = None
    cursor: Any = None


def concatenate_slices(
    slices: Sequence[DocumentSlice],
    seq_len: int,
    total: int,
    packing: Packing,
    type_id: int,
    document_mask: bool | None = None,
) -> Sample:
    """Build a packed sample of `total` tokens, padded at its end with id 0 and label `IGNORE_INDEX`.

    Args:
        slices: of documents; no longer than `total` together.
        seq_len: maximum length of an attention segment, in tokens.
        total: tokens of the sample.
        packing: decides the default of `document_mask`.
        type_id: of all tokens.
        document_mask: whether a slice has attention segments of its own. Without, the sample is cut every seq_len
            tokens: attention and positions run across documents, and labels remain within them.
    """
    if document_mask is None:
        document_mask = default_document_mask(packing)
    input_ids = np.zeros(total, dtype=np.int64)
    labels = np.full(total, IGNORE_INDEX, dtype=np.int64)
    is_padding = np.ones(total, dtype=np.bool_)
    lengths: list[int] = []
    starts: list[int] = []
    filled = 0
    for each in slices:
        size = len(each.input_ids)
        input_ids[filled : filled + size] = each.input_ids
        labels[filled : filled + size] = each.labels
        is_padding[filled : filled + size] = not each.has_text
        lengths += _segment_lengths(size, seq_len)
        starts.append(filled)
        filled += size
    lengths += _segment_lengths(total - filled, seq_len)
    if not document_mask:
        lengths = _segment_lengths(total, seq_len)
    return Sample(
        input_ids,
        labels,
        tuple(lengths),
        type_id,
        is_padding=_if_any(is_padding),
        images_at=_placed(slices, starts),
        **_counts(slices),
    )


def stack_slices(slices: Sequence[DocumentSlice], seq_len: int, rows: int, type_id: int) -> Sample:
    """Build an unpacked sample: one slice a row, padded on the right; missing rows are padding."""
    input_ids = np.zeros((rows, seq_len), dtype=np.int64)
    labels = np.full((rows, seq_len), IGNORE_INDEX, dtype=np.int64)
    for row, each in enumerate(slices):
        input_ids[row, : len(each.input_ids)] = each.input_ids
        labels[row, : len(each.labels)] = each.labels
    row_lengths = tuple(len(each.input_ids) for each in slices) + (0,) * (rows - len(slices))
    is_padding = _if_any(np.arange(seq_len) >= np.array(row_lengths)[:, None])
    return Sample(
        input_ids,
        labels,
        None,
        type_id,
        row_lengths=row_lengths,
        is_padding=is_padding,
        images_at=_placed(slices, range(0, rows * seq_len, seq_len)),
        **_counts(slices),
    )


def padding_sample(seq_len: int, micro_bsz: int, packing: Packing, document_mask: bool | None = None) -> Sample:
    """Build a sample of padding alone, with the shape of all others."""
    if packing == "unpacked":
        return stack_slices([], seq_len, micro_bsz, type_id=0)
    return concatenate_slices([], seq_len, micro_bsz * seq_len, packing, 0, document_mask)


def _if_any(is_padding: NDArray[np.bool_]) -> NDArray[np.bool_] | None:
    return is_padding if is_padding.any() else None


def _segment_lengths(length: int, seq_len: int) -> list[int]:
    """Cut `length` tokens into attention segments of at most `seq_len`."""
    full, rest = divmod(length, seq_len)
    return [seq_len] * full + ([rest] if rest else [])


def _placed(slices: Sequence[DocumentSlice], starts: Iterable[int]) -> tuple[PlacedImages, ...]:
    return tuple(
        PlacedImages(start, start + len(each.input_ids), each.images)
        for each, start in zip(slices, starts, strict=False)
        if each.images
    )


def _counts(slices: Sequence[DocumentSlice]) -> dict[str, Any]:
    """The fields of `Sample` that count documents."""
    return {
        "num_documents": sum(each.has_text for each in slices),
        "unreadable": tuple(each.unreadable for each in slices if each.unreadable is not None),
        "num_truncated_answers": sum(each.is_truncated_answer for each in slices),
    }
