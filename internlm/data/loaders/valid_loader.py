"""Valid loaders: every label of a valid set is evaluated exactly once, whatever the layout.

Owns how documents are cut for evaluation and dealt to ranks. A document is cut every seq_len tokens from its own start
and a piece is never cut again, so the loss of a set does not depend on micro_bsz, on packing or on the number of ranks.
Nothing is dropped: what does not fill a micro batch is padded, and ranks with fewer micro batches get masked ones, so
that all ranks take the same number of steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from internlm.data.batch import Batch, MicroBatch
from internlm.data.packing.collate import to_micro_batch
from internlm.data.packing.document_slice import DocumentSlice, make_slice
from internlm.data.packing.sample import concatenate_slices, stack_slices
from internlm.data.tokenized_files.document_index import summarize
from internlm.data.tokenized_files.folders import find_valid_sets, log_unread_files
from internlm.data.tokenized_files.reader import TokenizedFile
from internlm.utils.errors import ConfigError, DataError


def build_valid_loaders(
    folder: str | Path | None,
    *,
    seq_len: int,
    micro_bsz: int,
    vocab_size: int | None,
    valid_micro_num: int = 1,
    data_rank: int = 0,
    data_size: int = 1,
    packed: bool = True,
) -> dict[str, ValidLoader]:
    """One loader for each valid set of `folder` (see `find_valid_sets`), by name; none if `folder` is None.

    Args:
        valid_micro_num: micro batches a step on each data rank.
        packed: micro batches are packed, [1, micro_bsz * seq_len]; otherwise [micro_bsz, seq_len], one piece a row.
    Raises:
        DataError: the data is missing or malformed, or a set has no label.
    """
    if folder is None:
        return {}
    log_unread_files(folder)
    return {
        name: ValidLoader(
            name,
            paths,
            seq_len=seq_len,
            micro_bsz=micro_bsz,
            vocab_size=vocab_size,
            valid_micro_num=valid_micro_num,
            data_rank=data_rank,
            data_size=data_size,
            packed=packed,
        )
        for name, paths in find_valid_sets(folder).items()
    }


class ValidLoader:
    """The batches of one valid set on one data rank; every iteration is the same.

    `len()` is the number of steps, the same on every rank. `Batch.num_samples` counts micro batches of all ranks that
    hold documents, `Batch.sample_indices` those of this rank.

    Attributes:
        type_names: the name of the set; all tokens have type 0.
    """

    def __init__(
        self,
        name: str,
        paths: Sequence[Path],
        *,
        seq_len: int,
        micro_bsz: int,
        vocab_size: int | None,
        valid_micro_num: int = 1,
        data_rank: int = 0,
        data_size: int = 1,
        packed: bool = True,
    ) -> None:
        if not 0 <= data_rank < data_size:
            raise ConfigError(f"data_rank = {data_rank} is not in [0, data_size = {data_size})")
        self.type_names = [name]
        self._seq_len, self._micro_bsz, self._packed = seq_len, micro_bsz, packed
        self._micro_num, self._rank, self._size = valid_micro_num, data_rank, data_size
        for path in paths:
            summarize(path, 0)  # refuses a .meta that points outside the .bin now, not in the middle of a run
        self._files = [TokenizedFile(path, vocab_size) for path in paths]
        counts = np.concatenate([file.counts() for file in self._files])
        self._first_document = np.concatenate(([0], np.cumsum([len(file) for file in self._files])))
        # A piece of one token has no label: the last token of a document predicts nothing.
        pieces = -(-(counts - 1) // seq_len)
        self._piece_ends = np.cumsum(np.maximum(pieces, 0))
        if not len(self._piece_ends) or not self._piece_ends[-1]:
            raise DataError(f"{paths[0].parent}: no document of this valid set has two tokens, so there is no label")
        self._starts = self._micro_batch_starts(counts)

    def _micro_batch_starts(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """The first piece of each micro batch, and the number of pieces at the end: int64 [micro batches + 1]."""
        num_pieces = int(self._piece_ends[-1])
        if not self._packed:
            return np.append(np.arange(0, num_pieces, self._micro_bsz), num_pieces)
        document = np.searchsorted(self._piece_ends, np.arange(num_pieces), side="right")
        within = np.arange(num_pieces) - np.concatenate(([0], self._piece_ends))[document]
        lengths = np.minimum(counts[document] - within * self._seq_len, self._seq_len)
        filled = np.concatenate(([0], np.cumsum(lengths)))
        starts = [0]
        while starts[-1] < num_pieces:
            room = filled[starts[-1]] + self._micro_bsz * self._seq_len
            starts.append(int(np.searchsorted(filled, room, side="right")) - 1)
        return np.asarray(starts, dtype=np.int64)

    def __len__(self) -> int:
        """Steps of this loader, the same on every rank."""
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
        pieces = []
        if index < len(self._starts) - 1:
            pieces = [self._piece(piece) for piece in range(int(self._starts[index]), int(self._starts[index + 1]))]
        if self._packed:
            total = self._micro_bsz * self._seq_len
            return to_micro_batch(concatenate_slices(pieces, self._seq_len, total, "cut", type_id=0))
        return to_micro_batch(stack_slices(pieces, self._seq_len, self._micro_bsz, type_id=0))

    def _piece(self, piece: int) -> DocumentSlice:
        document = int(np.searchsorted(self._piece_ends, piece, side="right"))
        within = piece - (int(self._piece_ends[document - 1]) if document else 0)
        file_index = int(np.searchsorted(self._first_document, document, side="right")) - 1
        start = within * self._seq_len
        ids, loss_mask = self._files[file_index].read(
            document - int(self._first_document[file_index]), start, start + self._seq_len + 1
        )
        return make_slice(ids, loss_mask, min(self._seq_len, len(ids)))
