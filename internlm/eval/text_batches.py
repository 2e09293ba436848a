"""Puts several texts into micro-batches of the shape of a run's, for forward passes that score or continue them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from internlm.data.batch import MicroBatch
from internlm.data.packing.collate import to_micro_batch
from internlm.data.packing.document_slice import make_slice
from internlm.data.packing.sample import concatenate_slices, stack_slices


@dataclass(frozen=True)
class TextBatches:
    """The shape of micro-batches.

    Attributes:
        seq_len: length of an attention segment; no text is longer.
        rows: of a micro-batch.
        is_packed: whether the rows are one packed row.
    """

    seq_len: int
    rows: int
    is_packed: bool

    def groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """The numbers of the texts of these lengths that fit into one micro-batch each, in order."""
        groups: list[list[int]] = []
        room = 0
        for number, length in enumerate(lengths):
            size = length if self.is_packed else 1
            if size > room or not groups:
                groups.append([])
                room = self.rows * self.seq_len if self.is_packed else self.rows
            groups[-1].append(number)
            room -= size
        return groups

    def micro_batch(self, texts: Sequence[Sequence[int]]) -> tuple[MicroBatch, list[tuple[int, int]]]:
        """One micro-batch of texts, without a label, and the row and column at which each begins."""
        tokens = [np.array(ids, dtype=np.int64) for ids in texts]
        slices = [make_slice(ids, np.zeros(len(ids), dtype=np.bool_), len(ids)) for ids in tokens]
        if not self.is_packed:
            starts = [(row, 0) for row in range(len(texts))]
            return to_micro_batch(stack_slices(slices, self.seq_len, self.rows, type_id=0)), starts
        columns = np.cumsum([0, *map(len, texts)])[:-1].tolist()
        sample = concatenate_slices(slices, self.seq_len, self.rows * self.seq_len, "cut", 0, document_mask=True)
        return to_micro_batch(sample), [(0, column) for column in columns]
