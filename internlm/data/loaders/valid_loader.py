"""Loaders of validation sets: every label of a set is evaluated exactly once, for any layout.

Owns how documents are cut for evaluation and distributed over ranks. A document is cut every seq_len tokens from its
own start and nowhere else, so the loss of a set does not depend on micro_bsz, packing or the number of ranks. Nothing
is dropped: incomplete micro-batches are padded, and ranks with fewer micro-batches get masked ones, so that all ranks
take the same number of steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from internlm.data.batch import Batch, MicroBatch
from internlm.data.documents.valid_sets import ValidSet
from internlm.data.images.document_images import DocumentsWithImages
from internlm.data.images.loading import ImageLoader
from internlm.data.packing.collate import to_micro_batch
from internlm.data.packing.document_slice import DocumentSlice, make_slice
from internlm.data.packing.sample import Sample, concatenate_slices, stack_slices
from internlm.utils.errors import ConfigError, DataError
from internlm.utils.logging import get_logger

logger = get_logger(__name__)


def build_valid_loaders(
    sets: Iterable[ValidSet],
    *,
    seq_len: int,
    micro_bsz: int,
    vocab_size: int | None,
    valid_micro_num: int = 1,
    data_rank: int = 0,
    data_size: int = 1,
    packed: bool = True,
    images: ImageLoader | None = None,
) -> dict[str, ValidLoader]:
    """Build one loader for each validation set, by name.

    Args:
        sets: with different names; `folder_sets` finds those of a folder.
        seq_len: maximum length of a slice of a document, in tokens.
        micro_bsz: rows of a micro-batch.
        vocab_size: ids must be smaller; None accepts any.
        valid_micro_num: micro-batches of a step on each data rank.
        data_rank, data_size: this data rank, and the number of data ranks.
        packed: whether micro-batches are packed, [1, micro_bsz * seq_len], or have one slice a row,
            [micro_bsz, seq_len].
        images: reads the pictures of samples; None without a vision tower.

    Raises:
        DataError: the data is missing or malformed, or a set has no label.
    """
    return {
        each.name: ValidLoader(
            each,
            seq_len=seq_len,
            micro_bsz=micro_bsz,
            vocab_size=vocab_size,
            valid_micro_num=valid_micro_num,
            data_rank=data_rank,
            data_size=data_size,
            packed=packed,
            images=images,
        )
        for each in sets
    }


class ValidLoader:
    """The batches of one validation set on one data rank, the same in every iteration.

    `Batch.num_samples` is the number of micro-batches with documents over all ranks, `Batch.sample_indices` lists those
    of this rank.

    Attributes:
        type_names: the name of the set alone; all tokens have type 0.
        num_tokens: of the documents of the set, over all ranks.
    """

    def __init__(
        self,
        valid_set: ValidSet,
        *,
        seq_len: int,
        micro_bsz: int,
        vocab_size: int | None,
        valid_micro_num: int = 1,
        data_rank: int = 0,
        data_size: int = 1,
        packed: bool = True,
        images: ImageLoader | None = None,
    ) -> None:
        if not 0 <= data_rank < data_size:
            raise ConfigError(f"data_rank = {data_rank} is not in [0, data_size = {data_size})")
        self.type_names = [valid_set.name]
        self._seq_len, self._micro_bsz, self._packed = seq_len, micro_bsz, packed
        self._micro_num, self._rank, self._size = valid_micro_num, data_rank, data_size
        self._images = images
        self._files = valid_set.open(vocab_size)
        for file in self._files:
            if isinstance(file, DocumentsWithImages) and file.left_out:
                logger.warning("validation set '%s': %s", valid_set.name, file.left_out)
        counts = np.concatenate([file.counts() for file in self._files])
        self.num_tokens = int(counts.sum())
        self._first_document = np.concatenate(([0], np.cumsum([len(file) for file in self._files])))
        # A slice of one token has no label: the last token of a document predicts nothing.
        num_slices = -(-(counts - 1) // seq_len)
        self._slice_ends = np.cumsum(np.maximum(num_slices, 0))
        if not len(self._slice_ends) or not self._slice_ends[-1]:
            raise DataError(
                f"{valid_set.place}: no document of the validation set '{valid_set.name}' has two tokens, so it has no "
                "label"
            )
        self._starts = self._micro_batch_starts(counts)

    def _micro_batch_starts(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """First slice of each micro-batch, and the number of slices as the last entry: int64 [micro-batches + 1]."""
        num_slices = int(self._slice_ends[-1])
        if not self._packed:
            return np.append(np.arange(0, num_slices, self._micro_bsz), num_slices)
        document = np.searchsorted(self._slice_ends, np.arange(num_slices), side="right")
        within = np.arange(num_slices) - np.concatenate(([0], self._slice_ends))[document]
        lengths = np.minimum(counts[document] - within * self._seq_len, self._seq_len)
        filled = np.concatenate(([0], np.cumsum(lengths)))
        starts = [0]
        while starts[-1] < num_slices:
            limit = filled[starts[-1]] + self._micro_bsz * self._seq_len
            starts.append(int(np.searchsorted(filled, limit, side="right")) - 1)
        return np.asarray(starts, dtype=np.int64)

    def __len__(self) -> int:
        """Number of steps, the same on every rank."""
        return -(-(len(self._starts) - 1) // (self._micro_num * self._size))

    def __iter__(self) -> Iterator[Batch]:
        num_micro_batches = len(self._starts) - 1
        for step in range(len(self)):
            first = step * self._micro_num * self._size
            mine = range(first + self._rank * self._micro_num, first + (self._rank + 1) * self._micro_num)
            yield Batch(
                [self._micro_batch(index) for index in mine],
                min(self._micro_num * self._size, num_micro_batches - first),
                [index for index in mine if index < num_micro_batches],
            )

    def _micro_batch(self, index: int) -> MicroBatch:
        slices = []
        if index < len(self._starts) - 1:
            slices = [
                self._read_slice(number) for number in range(int(self._starts[index]), int(self._starts[index + 1]))
            ]
        if self._packed:
            total = self._micro_bsz * self._seq_len
            return self._to_micro_batch(concatenate_slices(slices, self._seq_len, total, "cut", type_id=0))
        return self._to_micro_batch(stack_slices(slices, self._seq_len, self._micro_bsz, type_id=0))

    def _read_slice(self, number: int) -> DocumentSlice:
        document = int(np.searchsorted(self._slice_ends, number, side="right"))
        within = number - (int(self._slice_ends[document - 1]) if document else 0)
        file_index = int(np.searchsorted(self._first_document, document, side="right")) - 1
        start = within * self._seq_len
        file, number_in_file = self._files[file_index], document - int(self._first_document[file_index])
        ids, loss_mask = file.read(number_in_file, start, start + self._seq_len + 1)
        found = make_slice(ids, loss_mask, min(self._seq_len, len(ids)))
        if isinstance(file, DocumentsWithImages):
            found.images = tuple(file.images(number_in_file))
        return found

    def _to_micro_batch(self, sample: Sample) -> MicroBatch:
        return to_micro_batch(sample if self._images is None else self._images.complete(sample))
