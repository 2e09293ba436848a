"""Global batches that are a pure function of the step, dealt to data ranks by index.

Legend of shapes: B sequences, S tokens a sequence, P = B * S.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from internlm.data.batch import IGNORE_INDEX, Batch, MicroBatch
from internlm.verify.case import Case

UNEVEN_SHARES = (0.0, 0.9, 0.5, 0.2)
"""Masked share of the labels of micro batches 0, 1, 2, 3, 4 (as 0) ..."""


class CaseBatches:
    """The batches of one data rank, as a trainer takes them."""

    def __init__(self, case: Case, data_rank: int, data_size: int) -> None:
        self._case, self._data_rank, self._data_size = case, data_rank, data_size
        self._step = 0

    def seek(self, step: int, num_consumed_samples: int) -> None:
        """Make the next batch that of `step`."""
        assert num_consumed_samples == step * self._case.num_micro_batches
        self._step = step

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield local_batch(self._case, self._step, self._data_rank, self._data_size)
            self._step += 1


def local_batch(case: Case, step: int, data_rank: int, data_size: int) -> Batch:
    """What one data rank gets of global batch `step`: neighbouring micro batches of it."""
    total = case.num_micro_batches
    share = total // data_size
    indices = [step * total + number for number in range(data_rank * share, (data_rank + 1) * share)]
    return Batch([_micro_batch(case, index) for index in indices], num_samples=total, sample_indices=indices)


def _micro_batch(case: Case, index: int) -> MicroBatch:
    """Micro batch `index` of all since the start."""
    data, documents = case.config.data, case.documents
    generator = torch.Generator().manual_seed(1000 + index)
    lengths = _lengths(case, generator)
    rows, width = (1, data.packed_length) if documents.packed else (data.micro_bsz, data.seq_len)
    tokens = torch.randint(0, case.config.model.vocab_size, (rows * width + 1,), generator=generator)
    labels = tokens[1:].clone()
    labels[_mask(case, index, labels, generator)] = IGNORE_INDEX
    position_ids = torch.zeros_like(labels)
    start = 0
    for length in lengths:
        position_ids[start : start + length] = torch.arange(length)
        labels[start + length - 1] = IGNORE_INDEX  # the next token is another document's
        start += length
        if not documents.packed:
            end = -(-start // width) * width
            labels[start:end] = IGNORE_INDEX  # padding
            start = end
    ends = torch.tensor((0, *lengths)).cumsum(0)
    return MicroBatch(
        input_ids=tokens[:-1].view(rows, width),
        labels=labels.view(rows, width),
        position_ids=position_ids.view(rows, width),
        type_ids=torch.zeros(rows, width, dtype=torch.int64),
        cu_seqlens=ends.int() if documents.packed else None,
        lengths=lengths if documents.packed else None,
        num_valid_tokens=int((labels != IGNORE_INDEX).sum()),
    )


def _lengths(case: Case, generator: torch.Generator) -> tuple[int, ...]:
    """Tokens of each document; packed, they fill the row, else there is one a row."""
    data, documents = case.config.data, case.documents
    if not documents.ragged:
        return (data.seq_len,) * data.micro_bsz
    if not documents.packed:
        return tuple(int(n) for n in torch.randint(1, data.seq_len + 1, (data.micro_bsz,), generator=generator))
    lengths = [1]  # A document of one token has no label at all.
    while (room := data.packed_length - sum(lengths)) > 0:
        lengths.append(int(torch.randint(1, min(room, data.seq_len) + 1, (), generator=generator)))
    return tuple(lengths)


def _mask(case: Case, index: int, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Which of the labels `[P]` contribute no loss, bool `[P]`."""
    masked = case.documents.masked
    random = torch.rand(labels.shape, generator=generator)
    if masked == "uneven":
        return random < UNEVEN_SHARES[index % len(UNEVEN_SHARES)]
    if masked == "ends":
        return torch.arange(len(labels)) >= len(labels) // 4
    return torch.full(labels.shape, masked == "all" or (masked == "micro_batches" and index % 3 == 1))
