"""Turns documents into samples: one sample is one micro batch of tokens.

Owns labels, segments and padding. Must not know files, order or ranks. Samples are numpy, so that loader workers hand
them over by value; `to_micro_batch` makes the tensors.

Legend of shapes: P = micro_bsz * seq_len tokens of a packed sample, B = micro_bsz, S = seq_len.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

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
    """

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    lengths: tuple[int, ...] | None
    type_id: int


@dataclass
class Piece:
    """Consecutive tokens of one document with their labels: both int64 [n]."""

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]


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
    return Sample(input_ids, labels, tuple(lengths), type_id)


def stack_pieces(pieces: Sequence[Piece], seq_len: int, rows: int, type_id: int) -> Sample:
    """An unpacked sample: one piece a row, padded on the right; missing rows are padding only."""
    input_ids = np.zeros((rows, seq_len), dtype=np.int64)
    labels = np.full((rows, seq_len), IGNORE_INDEX, dtype=np.int64)
    for row, piece in enumerate(pieces):
        input_ids[row, : len(piece.input_ids)] = piece.input_ids
        labels[row, : len(piece.labels)] = piece.labels
    return Sample(input_ids, labels, None, type_id)


def to_micro_batch(sample: Sample) -> MicroBatch:
    """The tensors of a sample; packed ones become [1, P]."""
    num_valid_tokens = int(np.count_nonzero(sample.labels != IGNORE_INDEX))
    if sample.lengths is None:
        input_ids, labels = torch.from_numpy(sample.input_ids), torch.from_numpy(sample.labels)
        position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids).contiguous()
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
    )
