"""Batches from token lists in memory: any iterable in place of tokenized files.

Owns how lists are packed into samples, and which data rank takes which sample. Must not know files. Does not shuffle.
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
    """An iterable over this data rank's batches of an iterable of token lists.

    Lists are concatenated and cut every micro_bsz * seq_len tokens. An attention segment has at most seq_len tokens,
    all of one list. Every rank reads all lists and takes its own samples, so the global batches are the same for any
    number of data ranks. Nothing is dropped: the last batch is filled with padding that contributes no loss.

    Args:
        documents: lists (or one-dimensional integer arrays) of token ids, the same on every rank. An id -t is token t
            without loss. May be infinite.
        vocab_size: ids must be smaller.
        seq_len: maximum length of an attention segment, in tokens.
        micro_bsz: a micro-batch has micro_bsz * seq_len tokens.
        micro_num: micro-batches of a step on each data rank.
        data_rank, data_size: this data rank, and the number of data ranks.

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
        problems = [f"{name} = {size}: must be at least 1" for name, size in sizes.items() if size < 1]
        if not 0 <= data_rank < data_size:
            problems.append(f"data_rank = {data_rank} is not in [0, data_size = {data_size})")
        if problems:
            raise ConfigError(problems)
        self._documents = documents
        self._vocab_size, self._seq_len, self._sample_length = vocab_size, seq_len, micro_bsz * seq_len
        self._micro_num, self._rank, self._size = micro_num, data_rank, data_size
        self._first_sample = 0

    def seek(self, step: int, num_consumed_samples: int) -> None:
        """Skip the first `num_consumed_samples` samples, of all ranks, in the next iteration."""
        self._first_sample = num_consumed_samples

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over the batches, from the start of `documents` or the sample set by `seek`.

        Raises:
            DataError: a document is not a list of integers, or has an id outside the vocabulary.
        """
        samples = itertools.islice(self._samples(), self._first_sample, None)
        first = self._first_sample
        per_step = self._micro_num * self._size
        while group := list(itertools.islice(samples, per_step)):
            mine = range(self._rank * self._micro_num, (self._rank + 1) * self._micro_num)
            micro_batches = [group[index] if index < len(group) else [] for index in mine]
            yield Batch(
                [
                    to_micro_batch(concatenate_slices(slices, self._seq_len, self._sample_length, "cut", type_id=0))
                    for slices in micro_batches
                ],
                num_samples=len(group),
                sample_indices=[first + index for index in mine if index < len(group)],
            )
            first += len(group)

    def _samples(self) -> Iterator[list[DocumentSlice]]:
        """The slices of each sample, of all ranks."""
        slices: list[DocumentSlice] = []
        remaining = self._sample_length
        for number, document in enumerate(self._documents):
            ids, loss_mask = self._parse(number, document)
            start = 0
            while start < len(ids):
                size = min(remaining, len(ids) - start)
                # One more token, if the document has it: the label at a cut is the next token of the document.
                stop = start + size + 1
                slices.append(make_slice(ids[start:stop], loss_mask[start:stop], size))
                start += size
                remaining -= size
                if remaining == 0:
                    yield slices
                    slices, remaining = [], self._sample_length
        if slices:
            yield slices

    def _parse(self, number: int, document: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Check a document and split it into ids and loss mask."""
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
