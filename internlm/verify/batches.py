"""Global batches that are a pure function of the step, distributed to data ranks by index.

Shapes: B sequences, S tokens per sequence, P = B * S.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from internlm.data.batch import IGNORE_INDEX, Batch, MicroBatch
from internlm.data.packing.image_placeholders import IMAGE_FEATURES
from internlm.verify.case import Case
from internlm.verify.vision import draw_pictures, draw_pixels, feature_indices

UNEVEN_SHARES = (0.0, 0.9, 0.5, 0.2)
"""Masked share of the labels, by micro-batch number modulo 4."""


class CaseBatches:
    """The batches of one data rank, with the interface that a trainer expects."""

    def __init__(self, case: Case, data_rank: int, data_size: int) -> None:
        self._case, self._data_rank, self._data_size = case, data_rank, data_size
        self._step = 0

    def seek(self, step: int, num_consumed_samples: int) -> None:
        """Continue with the batch of `step`."""
        assert num_consumed_samples == step * self._case.num_micro_batches
        self._step = step

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield local_batch(self._case, self._step, self._data_rank, self._data_size)
            self._step += 1


def local_batch(case: Case, step: int, data_rank: int, data_size: int) -> Batch:
    """One data rank's share of global batch `step`: consecutive micro-batches."""
    total = case.num_micro_batches
    share = total // data_size
    indices = [step * total + number for number in range(data_rank * share, (data_rank + 1) * share)]
    return Batch([_micro_batch(case, index) for index in indices], num_samples=total, sample_indices=indices)


def _micro_batch(case: Case, index: int) -> MicroBatch:
    """Micro-batch `index`, counted over all steps and ranks."""
    data, documents = case.config.data, case.documents
    generator = torch.Generator().manual_seed(1000 + index)
    lengths = _lengths(case, generator)
    rows, width = (1, data.packed_length) if documents.packed else (data.micro_bsz, data.seq_len)
    tokens = torch.randint(0, case.config.model.vocab_size, (rows * width + 1,), generator=generator)
    labels = tokens[1:].clone()
    labels[_mask(case, index, labels, generator)] = IGNORE_INDEX
    position_ids = torch.zeros_like(labels)
    is_padding = torch.zeros_like(labels, dtype=torch.bool)
    start, documents_at = 0, []
    for length in lengths:
        documents_at.append((start, length))
        position_ids[start : start + length] = torch.arange(length)
        labels[start + length - 1] = IGNORE_INDEX  # the next token belongs to another document
        start += length
        if not documents.packed:
            end = -(-start // width) * width
            labels[start:end] = IGNORE_INDEX
            is_padding[start:end] = True
            start = end
    ends = torch.tensor((0, *lengths)).cumsum(0)
    ids, extra = tokens[:-1], {}
    pictures = draw_pictures(case.config, index, documents_at, generator)
    if data.is_multimodal:
        indices = feature_indices(case.config, pictures, len(ids))
        ids = ids.masked_fill(indices >= 0, 0)
        labels[:-1][indices[1:] >= 0] = IGNORE_INDEX  # placeholders are not predicted
        extra[IMAGE_FEATURES] = indices.view(rows, width)
    return MicroBatch(
        input_ids=ids.view(rows, width),
        labels=labels.view(rows, width),
        position_ids=position_ids.view(rows, width),
        type_ids=torch.zeros(rows, width, dtype=torch.int64),
        cu_seqlens=ends.int() if documents.packed else None,
        lengths=lengths if documents.packed else None,
        num_valid_tokens=int((labels != IGNORE_INDEX).sum()),
        is_padding=is_padding.view(rows, width) if is_padding.any() else None,
        num_padding_tokens=int(is_padding.sum()),
        extra=extra,
        images=draw_pixels(len(pictures), generator),
    )


def _lengths(case: Case, generator: torch.Generator) -> tuple[int, ...]:
    """Tokens of each document. Packed documents fill the row; otherwise each row has one."""
    data, documents = case.config.data, case.documents
    if not documents.ragged:
        return (data.seq_len,) * data.micro_bsz
    if not documents.packed:
        return tuple(int(n) for n in torch.randint(1, data.seq_len + 1, (data.micro_bsz,), generator=generator))
    lengths = [1]  # a document of one token has no label at all
    while (remaining := data.packed_length - sum(lengths)) > 0:
        lengths.append(int(torch.randint(1, min(remaining, data.seq_len) + 1, (), generator=generator)))
    return tuple(lengths)


def _mask(case: Case, index: int, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Bool `[P]`: which of the labels `[P]` are masked, so that they contribute no loss."""
    masked = case.documents.masked
    random = torch.rand(labels.shape, generator=generator)
    if masked == "uneven":
        return random < UNEVEN_SHARES[index % len(UNEVEN_SHARES)]
    if masked == "ends":
        return torch.arange(len(labels)) >= len(labels) // 4
    return torch.full(labels.shape, masked == "all" or (masked == "micro_batches" and index % 3 == 1))
