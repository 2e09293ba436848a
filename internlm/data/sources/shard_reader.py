"""Packs the rows of one shard into samples, one after the other, from a cursor that needs nothing before it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from internlm.data.images.image_source import ImageCell, ImageFile, ImageSource
from internlm.data.packing.best_fit import pack_best_fit
from internlm.data.packing.document_slice import DocumentSlice, padding_slice, unreadable_slice
from internlm.data.packing.fill_in_the_middle import FillInTheMiddle
from internlm.data.packing.sample import Packing, Sample, concatenate_slices, padding_sample, stack_slices
from internlm.data.permutation import derive_key, permute
from internlm.data.rows.row_file import RowFile
from internlm.data.rows.shuffled_rows import OrderedRow, RowPosition, ShuffledRows
from internlm.data.sources.row_encoder import RowEncoder
from internlm.data.sources.sample_stream import NoDocumentsError
from internlm.data.sources.slice_reader import SliceReader
from internlm.utils.errors import DataError
from internlm.utils.logging import get_logger

_MAX_ROWS = 64
"""Rows that are read and tokenized together."""
_MAX_UNREADABLE = 1000
"""Unreadable rows in sequence after which there is something else wrong than single rows."""
_MIN_ROWS_WITHOUT_DOCUMENT, _MIN_PASSES_WITHOUT_DOCUMENT = 10_000, 30
"""The data has too few documents after so many rows in sequence without one, or, if that is less, as many as so many
epochs have. A shard has other rows in each epoch: if it is short, chance leaves it without a document now and then."""
_WINDOW_SAMPLES = 8
"""Best fit packs the documents of so many samples together. The packing depends on it."""

logger = get_logger(__name__)


class ShardCursor(NamedTuple):
    """Where a shard continues.

    Attributes:
        position: of the first row of the next sample; with best fit, of its window.
        within: tokens of that row that samples have had; with best fit, samples of the window.
    """

    position: RowPosition = RowPosition()
    within: int = 0

    def to_json(self) -> list[int]:
        """As numbers."""
        return [*self.position, self.within]

    @classmethod
    def from_json(cls, values: Sequence[int]) -> ShardCursor:
        """The inverse of `to_json`."""
        epoch, unit, row, within = values
        return cls(RowPosition(epoch, unit, row), within)


@dataclass(frozen=True)
class RowPacking:
    """How documents become samples; see `internlm.data.sources.document_source.DocumentSource`.

    Attributes:
        min_lengths: minimum number of tokens of a document, by type id; shorter ones are left out.
    """

    seq_len: int
    micro_bsz: int
    packing: Packing
    document_mask: bool
    fim: FillInTheMiddle | None
    min_lengths: tuple[int, ...]
    skip_bad_documents: bool

    @property
    def total(self) -> int:
        """Tokens of a sample, with padding."""
        return self.micro_bsz * self.seq_len

    @property
    def capacity(self) -> int:
        """Tokens of a best-fit bin."""
        return self.total if self.document_mask else self.seq_len

    def padding(self) -> Sample:
        """A sample of padding alone."""
        return padding_sample(self.seq_len, self.micro_bsz, self.packing, self.document_mask)


@dataclass(frozen=True)
class _Document:
    """A tokenized row, read as the only document of a file by `SliceReader`."""

    row: OrderedRow
    ids: NDArray[np.int64]
    loss_mask: NDArray[np.bool_]
    type_id: int
    error: DataError | None
    image_sources: tuple[ImageFile | ImageCell, ...]

    def counts(self, start: int, stop: int) -> NDArray[np.int64]:
        return np.array([len(self.ids)])

    def read(
        self, document: int, start: int = 0, stop: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        return self.ids[start:stop], self.loss_mask[start:stop]

    @property
    def left_out(self) -> None:
        return None

    def images(self, document: int) -> Sequence[ImageSource]:
        return self.image_sources


class ShardReader:
    """The samples of one shard from a cursor on.

    Args:
        shard: its number.
        order: of the rows.
        files: that `order` numbers.
        type_ids: of the files.
        encoder: of rows.
        packing: of documents.
        note_left_out: called with each row that is no document: its place, and the reason.
        cursor: where to start.
    """

    def __init__(
        self,
        shard: int,
        order: ShuffledRows,
        files: Sequence[RowFile],
        type_ids: Sequence[int],
        encoder: RowEncoder,
        packing: RowPacking,
        note_left_out: Callable[[str, str], None],
        cursor: ShardCursor,
    ) -> None:
        self._shard, self._order, self._files, self._type_ids = shard, order, files, type_ids
        self._encoder, self._packing, self._note_left_out = encoder, packing, note_left_out
        self.cursor = cursor
        self._pending: deque[_Document] = deque()
        self._position = cursor.position
        self._mean_length = float(packing.seq_len)
        self._num_unreadable = 0
        self._last_left_out = ""
        self._is_skipping = False
        self._window: list[list[DocumentSlice]] = []
        self._window_types: list[list[int]] = []

    def next_sample(self) -> Sample:
        """Pack the next sample, and move the cursor behind it.

        Raises:
            DataError: a row cannot be read, or no row of the shard has enough tokens.
        """
        pack = {"unpacked": self._rows_of_documents, "best_fit": self._best_fit}.get(self._packing.packing, self._cut)
        sample = pack()
        sample.cursor = self.cursor.to_json()
        return sample

    def skip_sample(self) -> None:
        """Move the cursor behind the next sample, whose rows may be unreadable."""
        self._is_skipping = True
        try:
            self.next_sample()
        finally:
            self._is_skipping = False

    def _cut(self) -> Sample:
        packing, start = self._packing, self.cursor.within
        # After resuming with another tokenizer the document may be shorter; it is then read from its beginning.
        if start and (start >= len(self._first().ids) or self._first().image_sources):
            start = 0
        slices: list[DocumentSlice] = []
        types: list[int] = []
        filled = 0
        while filled < packing.total:
            document = self._first()
            space = packing.capacity - filled % packing.capacity
            if document.image_sources and len(document.ids) > space:
                slices.append(padding_slice(space))
                types.append(0)
                filled += space
                continue
            stop = min(len(document.ids), start + packing.total - filled)
            column = 0 if packing.document_mask else filled % packing.seq_len
            slices.append(self._slice(document, start, stop, column))
            types.append(document.type_id)
            filled += max(stop - start, 0)
            start = stop
            if stop >= len(document.ids):
                self._pending.popleft()
                start = 0
        self.cursor = ShardCursor(self._first_position(), start)
        return self._concatenate(slices, types)

    def _rows_of_documents(self) -> Sample:
        packing = self._packing
        slices: list[DocumentSlice] = []
        types: list[int] = []
        while len(slices) < packing.micro_bsz:
            document = self._first()
            self._pending.popleft()
            slices.append(self._slice(document, 0, packing.seq_len, 0))
            types.append(document.type_id)
        self.cursor = ShardCursor(self._first_position(), 0)
        sample = stack_slices(slices, packing.seq_len, packing.micro_bsz, types[0])
        if len(set(types)) > 1:
            sample.type_ids = np.repeat(np.array(types, dtype=np.int64)[:, None], packing.seq_len, axis=1)
        return sample

    def _best_fit(self) -> Sample:
        if not self._window:
            self._fill_window()
        position, number = self.cursor
        # After resuming with other settings the window may have fewer samples; it is then read from its beginning.
        if number >= len(self._window):
            number = 0
        sample = self._concatenate(self._window[number], self._window_types[number])
        if number + 1 < len(self._window):
            self.cursor = ShardCursor(position, number + 1)
        else:
            self._window, self._window_types = [], []
            self.cursor = ShardCursor(self._first_position(), 0)
        return sample

    def _fill_window(self) -> None:
        """Pack the documents from the position of the cursor on."""
        packing, documents = self._packing, []
        num_tokens = 0
        while num_tokens < _WINDOW_SAMPLES * packing.total:
            documents.append(self._first())
            self._pending.popleft()
            num_tokens += len(documents[-1].ids)
        pieces = [
            (document, start)
            for document in documents
            for start in range(0, max(len(document.ids), 1), packing.seq_len)
        ]
        lengths = np.array(
            [max(1, min(len(document.ids) - start, packing.seq_len)) for document, start in pieces], dtype=np.int64
        )
        bins = pack_best_fit(lengths, packing.capacity)
        # The longest documents are in the first bins: without a shuffle, all shards would have them at the same time.
        num_bins, place = int(bins.max()) + 1, self.cursor.position
        bins = permute(np.arange(num_bins), num_bins, derive_key(self._shard, *place))[bins]
        slices: list[list[DocumentSlice]] = [[] for _ in range(num_bins)]
        types: list[list[int]] = [[] for _ in slices]
        for (document, start), number in zip(pieces, bins, strict=True):
            slices[number].append(self._slice(document, start, min(start + packing.seq_len, len(document.ids)), 0))
            types[number].append(document.type_id)
        for bin_slices, bin_types in zip(slices, types, strict=True):
            bin_slices.append(padding_slice(packing.capacity - sum(len(each.input_ids) for each in bin_slices)))
            bin_types.append(0)
        per_sample = packing.total // packing.capacity
        firsts = range(0, len(slices), per_sample)
        self._window = [list(chain.from_iterable(slices[first : first + per_sample])) for first in firsts]
        self._window_types = [list(chain.from_iterable(types[first : first + per_sample])) for first in firsts]

    def _concatenate(self, slices: list[DocumentSlice], types: list[int]) -> Sample:
        packing = self._packing
        sample = concatenate_slices(
            slices, packing.seq_len, packing.total, packing.packing, types[0], packing.document_mask
        )
        if len(set(types)) > 1:
            lengths = [len(each.input_ids) for each in slices]
            type_ids = np.repeat(np.array(types, dtype=np.int64), lengths)
            sample.type_ids = np.concatenate((type_ids, np.zeros(packing.total - len(type_ids), dtype=np.int64)))
        return sample

    def _slice(self, document: _Document, start: int, stop: int, column: int) -> DocumentSlice:
        packing = self._packing
        if document.error is not None:
            return unreadable_slice(0, str(document.error))
        reader = SliceReader(
            document,
            (document.row.position.epoch, document.row.file),
            seq_len=packing.seq_len,
            is_unpacked=packing.packing == "unpacked",
            skip_bad_documents=packing.skip_bad_documents,
            fim=packing.fim,
        )
        return reader.read(document.row.row, start, stop, column)

    def _first(self) -> _Document:
        """The first document that is not used up."""
        first_epoch, num_rows = self._position.epoch, 0
        enough = min(_MIN_ROWS_WITHOUT_DOCUMENT, _MIN_PASSES_WITHOUT_DOCUMENT * self._order.num_rows)
        while not self._pending:
            if self._position.epoch > first_epoch + 1 and num_rows >= enough:
                raise NoDocumentsError(
                    f"{self._files[0].path.parent}: {num_rows:,} rows in sequence (shard {self._shard} of "
                    f"{self._order.num_shards}) are no documents, at last: {self._last_left_out}"
                )
            num_rows += self._read_rows()
        document = self._pending[0]
        if document.error is not None and not self._packing.skip_bad_documents and not self._is_skipping:
            raise document.error
        self._num_unreadable = 0 if document.error is None else self._num_unreadable + 1
        if self._num_unreadable > _MAX_UNREADABLE:
            raise NoDocumentsError(
                f"more than {_MAX_UNREADABLE:,} rows in sequence cannot be read, at last: {document.error}"
            )
        return document

    def _first_position(self) -> RowPosition:
        return self._pending[0].row.position if self._pending else self._position

    def _read_rows(self) -> int:
        """Read the next rows, and return how many."""
        # About one sample, however long documents are.
        count = min(_MAX_ROWS, max(1, math.ceil(self._packing.total / self._mean_length)))
        rows = self._order.rows(self._shard, self._position, count)
        encoded = self._encoder.encode([(self._files[row.file], row.row) for row in rows])
        for row, each in zip(rows, encoded, strict=True):
            type_id = self._type_ids[row.file]
            left_out = each.left_out
            if left_out is None and each.error is None and len(each.ids) < self._packing.min_lengths[type_id]:
                left_out = f"it has {len(each.ids)} tokens, and data.min_length is {self._packing.min_lengths[type_id]}"
            if left_out is None:
                self._pending.append(_Document(row, each.ids, each.loss_mask, type_id, each.error, each.images))
            else:
                place = f"{self._files[row.file].path}: row {row.row}"
                self._last_left_out = f"{place}: {left_out}"
                self._note_left_out(place, left_out)
        self._position = rows[-1].following
        self._mean_length = max(1.0, float(np.mean([len(each.ids) for each in encoded])))
        return len(rows)
