"""Batches from token lists in memory: a caller's own iterable in place of tokenized files.

Owns how lists become packed samples, and which data rank takes which. Must not know files, and does not shuffle: the
order is that of the iterable.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from internlm.data.batch import Batch
from internlm.data.packing.collate import to_micro_batch
from internlm.data.packing.document_slice import DocumentSlice, make_slice
from internlm.data.packing.sample import concatenate_slices
from internlm.utils.errors import ConfigError, DataError


class TokenListLoader:
    """This data rank's batches of an iterable of token lists.

    Lists are packed one behind the other and cut every micro_bsz * seq_len tokens; attention never crosses from one
    list to the next, and is cut every seq_len tokens within one. Every rank reads all lists and takes its own samples,
    so the global batches are the same for any number of data ranks. Nothing is dropped: the last batch is filled up
    with padding that contributes no loss.

    Args:
        documents: lists (or one-dimensional integer arrays) of token ids, the same on every rank. An id -t is token t
            that contributes no loss. May be endless.
        vocab_size: ids of this size and above are refused.
        seq_len: longest attention segment.
        micro_bsz: a micro batch has micro_bsz * seq_len tokens.
        micro_num: micro batches of a batch on each data rank.
        data_rank, data_size: which share is this rank's.

    Raises:
        ConfigError: a size is less than 1, or data_rank is not in [0, data_size).
    """

    def __init__(
        self,
        documents: Iterable[Sequence[int]],
        *,
        vocab_size: int,
        seq_len: int,
        micro_bsz: int = 1,
        micro_num: int = 1,
        data_rank: int = 0,
        data_size: int = 1,
    ) -> None:
        sizes = {"vocab_size": vocab_size, "seq_len": seq_len, "micro_bsz": micro_bsz, "micro_num": micro_num}
        mistakes = [f"{name} = {size}: must be at least 1" for name, size in sizes.items() if size < 1]
        if not 0 <= data_rank < data_size:
            mistakes.append(f"data_rank = {data_rank} is not in [0, data_size = {data_size})")
        if mistakes:
            raise ConfigError(mistakes)
        self._documents = documents
        self._vocab_size, self._seq_len, self._total = vocab_size, seq_len, micro_bsz * seq_len
        self._micro_num, self._rank, self._size = micro_num, data_rank, data_size
        self._first_sample = 0

    def seek(self, step: int, num_consumed_samples: int) -> None:
        """Let the next iteration pass over the first `num_consumed_samples` samples (of all ranks)."""
        self._first_sample = num_consumed_samples

    def __iter__(self) -> Iterator[Batch]:
        """The batches, from the start of `documents` or from where `seek` set.

        Raises:
            DataError: a document is no list of integers, or has an id outside the vocabulary.
        """
        samples = itertools.islice(self._samples(), self._first_sample, None)
        first = self._first_sample
        per_step = self._micro_num * self._size
        while group := list(itertools.islice(samples, per_step)):
            mine = range(self._rank * self._micro_num, (self._rank + 1) * self._micro_num)
            pieces = [group[index] if index < len(group) else [] for index in mine]
            yield Batch(
                [to_micro_batch(concatenate_slices(p, self._seq_len, self._total, "cut", type_id=0)) for p in pieces],
                num_samples=len(group),
                sample_indices=[first + index for index in mine if index < len(group)],
            )
            first += len(group)

    def _samples(self) -> Iterator[list[DocumentSlice]]:
        """The pieces of each sample of all ranks."""
        pieces: list[DocumentSlice] = []
        room = self._total
        for number, document in enumerate(self._documents):
            ids, loss_mask = self._checked(number, document)
            start = 0
            while start < len(ids):
                size = min(room, len(ids) - start)
                # One token more, if the document has it: the label at a cut is the real next token.
                slice_ = slice(start, start + size + 1)
                pieces.append(make_slice(ids[slice_], loss_mask[slice_], size))
                start += size
                room -= size
                if room == 0:
                    yield pieces
                    pieces, room = [], self._total
        if pieces:
            yield pieces

    def _checked(self, number: int, document: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        signed = np.asarray(document if len(document) else np.zeros(0, dtype=np.int64))
        if signed.ndim != 1 or signed.dtype.kind not in "iu":
            raise DataError(
                f"document {number} (counted from 0) is not a list of token ids but {type(document).__name__} of "
                f"{signed.dtype}; tokenize text first"
            )
        signed = signed.astype(np.int64)
        ids = np.abs(signed)
        if len(ids) and int(ids.max()) >= self._vocab_size:
            raise DataError(
                f"document {number} (counted from 0): token {int(ids.max())} at position {int(ids.argmax())} is "
                f"outside the vocabulary of {self._vocab_size}; the model's vocab_size must be that of the tokenizer"
            )
        return ids, signed >= 0
