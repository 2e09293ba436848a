"""The batches of transformers' loops: the documents of a measurement in one of the forms that users give them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from speed.corpus import ARRAY, LENGTHS
from torch import Tensor

Form = Literal["rows", "packed", "padded"]
"""`rows`: documents one after another in rows of equal length, which attend to each other; `packed`: one row, whose
documents are told apart by positions that begin again; `padded`: a row for each document."""

IGNORED = -100
"""Label of a token without loss, in transformers."""


def batches_of(folder: Path, form: Form, micro_bsz: int) -> Iterator[dict[str, Tensor]]:
    """Micro-batches as arguments of a class of transformers, repeated endlessly.

    All forms have the same tokens in each micro-batch: documents are cut where it ends.

    Args:
        folder: written by `write_corpus`.
        form: of the batches.
        micro_bsz: sequences per micro-batch.
    """
    rows = torch.from_numpy(np.load(folder / ARRAY))
    documents = _documents(rows.flatten(), np.load(folder / LENGTHS).tolist(), micro_bsz * rows.shape[1])
    if form == "rows":
        batches = [{"input_ids": micro, "labels": micro} for micro in rows.split(micro_bsz)]
    else:
        batches = [_packed(each) if form == "packed" else _padded(each) for each in documents]
    return itertools.cycle(batches)


def _documents(tokens: Tensor, lengths: list[int], size: int) -> list[list[Tensor]]:
    """The documents in each `size` tokens."""
    ends = set(itertools.accumulate(lengths))
    cuts = sorted(ends | set(range(size, len(tokens), size)))
    parts = iter(tokens.split([end - start for start, end in itertools.pairwise([0, *cuts])]))
    result: list[list[Tensor]] = []
    for _ in range(len(tokens) // size):
        result.append([])
        while sum(map(len, result[-1])) < size:
            result[-1].append(next(parts))
    return result


def _packed(documents: list[Tensor]) -> dict[str, Tensor]:
    labels = [torch.cat([document.new_tensor([IGNORED]), document[1:]]) for document in documents]
    positions = [torch.arange(len(document)) for document in documents]
    parts = {"input_ids": documents, "labels": labels, "position_ids": positions}
    return {name: torch.cat(part).unsqueeze(0) for name, part in parts.items()}


def _padded(documents: list[Tensor]) -> dict[str, Tensor]:
    def pad(rows: list[Tensor], value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    ones = [torch.ones_like(document) for document in documents]
    return {"input_ids": pad(documents, 0), "labels": pad(documents, IGNORED), "attention_mask": pad(ones, 0)}
