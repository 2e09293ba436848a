"""Turns documents into samples: one sample is one micro batch of tokens.

Owns labels, segments and padding. Must not know files, order or ranks. Samples are numpy, so that loader workers hand
them over by value; `to_micro_batch` makes the tensors.

Legend of shapes: P = micro_bsz * seq_len tokens of a packed sample, B = micro_bsz, S = seq_len.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from internlm.data.batch import IGNORE_INDEX, MicroBatch

Packing = Literal["cut", "pack_sample_into_one", "unpacked"]
PACKINGS: tuple[Packing, ...] = ("cut", "pack_sample_into_one", "unpacked")


@dataclass
class Sample:
    """The arrays of one micro batch.

    Attributes:
        input_ids: int64 [P], or [B, S] when unpacked.
        labels: int64 of the same shape.
        lengths: attention segments, adding up to P; None when unpacked.
        type_id: the type of all tokens.
        num_documents: documents, or parts of them, that the tokens come from.
        row_lengths: tokens of each row before its padding; None when packed.
        unreadable: one message for each document that could not be read and is padding here.
        num_cut_answers: documents of which the cut at seq_len left no label.
    """

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    lengths: tuple[int, ...] | None
    type_id: int
    num_documents: int
    row_lengths: tuple[int, ...] | None = None
    unreadable: tuple[str, ...] = ()
    num_cut_answers: int = 0


@dataclass
class Piece:
    """Consecutive tokens of one document with their labels: both int64 [n].

    Attributes:
        unreadable: why the document could not be read, if it is one whose place holds padding.
        is_cut_answer: the cut at seq_len left no label, though the document has some.
    """

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    unreadable: str | None = None
    is_cut_answer: bool = False

    @property
    def is_document(self) -> bool:
        """Whether there is text in it, and not padding alone."""
        return len(self.input_ids) > 0 and self.unreadable is None


def unreadable_piece(length: int, reason: str) -> Piece:
    """`length` tokens of padding in the place of a document that cannot be read."""
    return Piece(np.zeros(length, dtype=np.int64), np.full(length, IGNORE_INDEX, dtype=np.int64), unreadable=reason)


def make_piece(ids: NDArray[np.int64], loss_mask: NDArray[np.bool_], length: int) -> Piece:
    """The first `length` tokens of a document's slice, labelled by the next token of the document.

    Args:
        ids: int64 [length + 1], or [length] if the document ends here (the last label is then `IGNORE_INDEX`).
        loss_mask: bool of the same shape; False where the token is never a label.
    """
    labels = np.full(length, IGNORE_INDEX, dtype=np.int64)
    following = np.where(loss_mask[1:], ids[1:], IGNORE_INDEX)
    labels[: len(following)] = following
    return Piece(ids[:length], labels)


def split_length(length: int, seq_len: int) -> list[int]:
    """Attention segments of a piece: every `seq_len` tokens a new one."""
    full, rest = divmod(length, seq_len)
    return [seq_len] * full + ([rest] if rest else [])


def join_pieces(pieces: Sequence[Piece], seq_len: int, total: int, packing: Packing, type_id: int) -> Sample:
    """A packed sample of `total` tokens; what the pieces leave free is padding (id 0, `IGNORE_INDEX`)."""
    input_ids = np.zeros(total, dtype=np.int64)
    labels = np.full(total, IGNORE_INDEX, dtype=np.int64)
    lengths: list[int] = []
    filled = 0
    for piece in pieces:
        size = len(piece.input_ids)
        input_ids[filled : filled + size] = piece.input_ids
        labels[filled : filled + size] = piece.labels
        lengths += split_length(size, seq_len)
        filled += size
    lengths += split_length(total - filled, seq_len)
    if packing == "pack_sample_into_one":
        lengths = split_length(total, seq_len)
    return Sample(input_ids, labels, tuple(lengths), type_id, **_facts(pieces))


def stack_pieces(pieces: Sequence[Piece], seq_len: int, rows: int, type_id: int) -> Sample:
    """An unpacked sample: one piece a row, padded on the right; missing rows are padding only."""
    input_ids = np.zeros((rows, seq_len), dtype=np.int64)
    labels = np.full((rows, seq_len), IGNORE_INDEX, dtype=np.int64)
    for row, piece in enumerate(pieces):
        input_ids[row, : len(piece.input_ids)] = piece.input_ids
        labels[row, : len(piece.labels)] = piece.labels
    row_lengths = tuple(len(piece.input_ids) for piece in pieces) + (0,) * (rows - len(pieces))
    return Sample(input_ids, labels, None, type_id, row_lengths=row_lengths, **_facts(pieces))


def padding_sample(seq_len: int, micro_bsz: int, packing: Packing) -> Sample:
    """A sample of padding alone, of the same shape as all others."""
    if packing == "unpacked":
        return stack_pieces([], seq_len, micro_bsz, type_id=0)
    return join_pieces([], seq_len, micro_bsz * seq_len, packing, type_id=0)


def _facts(pieces: Sequence[Piece]) -> dict[str, Any]:
    """What a sample says of its pieces."""
    return {
        "num_documents": sum(piece.is_document for piece in pieces),
        "unreadable": tuple(piece.unreadable for piece in pieces if piece.unreadable is not None),
        "num_cut_answers": sum(piece.is_cut_answer for piece in pieces),
    }


def to_micro_batch(sample: Sample) -> MicroBatch:
    """The tensors of a sample; packed ones become [1, P]."""
    num_valid_tokens = int(np.count_nonzero(sample.labels != IGNORE_INDEX))
    if sample.lengths is None:
        input_ids, labels = torch.from_numpy(sample.input_ids), torch.from_numpy(sample.labels)
        positions = np.arange(input_ids.shape[1])
        # 0 in the padding, so that the largest position of a row tells the length of its document on the device too.
        position_ids = torch.from_numpy(positions * (positions < np.array(sample.row_lengths)[:, None]))
        cu_seqlens = None
    else:
        input_ids, labels = torch.from_numpy(sample.input_ids)[None], torch.from_numpy(sample.labels)[None]
        ends = np.cumsum(sample.lengths)
        starts = ends - sample.lengths
        position_ids = torch.from_numpy(np.arange(ends[-1]) - np.repeat(starts, sample.lengths))[None]
        cu_seqlens = torch.from_numpy(np.concatenate(([0], ends)).astype(np.int32))
    return MicroBatch(
        input_ids=input_ids,
        labels=labels,
        position_ids=position_ids,
        type_ids=torch.full_like(input_ids, sample.type_id),
        cu_seqlens=cu_seqlens,
        lengths=sample.lengths,
        num_valid_tokens=num_valid_tokens,
        num_documents=sample.num_documents,
    )


def pin(micro: MicroBatch) -> MicroBatch:
    """The same micro batch in page-locked memory, from which copies to a CUDA device are asynchronous."""
    return MicroBatch(
        input_ids=micro.input_ids.pin_memory(),
        labels=micro.labels.pin_memory(),
        position_ids=micro.position_ids.pin_memory(),
        type_ids=micro.type_ids.pin_memory(),
        cu_seqlens=None if micro.cu_seqlens is None else micro.cu_seqlens.pin_memory(),
        lengths=micro.lengths,
        num_valid_tokens=micro.num_valid_tokens,
        num_documents=micro.num_documents,
    )
