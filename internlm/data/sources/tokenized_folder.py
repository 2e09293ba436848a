"""Numbered samples of a train folder: `sample(i)` for i in [0, N), packed lazily.

Owns the map from a sample's number to the documents it is made of. Must not know order, ranks or batches.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from internlm.data.batch import IGNORE_INDEX
from internlm.data.packing.document_slice import DocumentSlice, make_slice, unreadable_slice
from internlm.data.packing.sample import Packing, Sample, concatenate_slices, padding_sample, stack_slices
from internlm.data.tokenized_files.document_index import DocumentIndex, summarize
from internlm.data.tokenized_files.folders import find_train_files
from internlm.data.tokenized_files.reader import TokenizedFile
from internlm.utils.errors import DataError, nearest
from internlm.utils.logging import get_logger

_OPEN_FILES = 128
"""Each open file holds three descriptors; the usual limit of a process is 1024."""


@dataclass(frozen=True)
class _FileEntry:
    path: Path
    type_id: int
    min_length: int
    places: int
    """Tokens (packed) or documents (unpacked) that the samples of the file cover."""


class TokenizedFolderSource:
    """The samples of a train folder.

    Packed: the shuffled documents of one file are concatenated and cut every P = micro_bsz * seq_len tokens; the
    incomplete tail of each file is dropped. Unpacked: micro_bsz documents a sample, each cut off at seq_len tokens; the
    last sample of a file may have fewer.

    Args:
        folder: see `find_train_files`.
        packing: see doc/data.md.
        min_length: documents with fewer tokens are left out.
        min_length_dict: the same by type name, where it differs.
        vocab_size: ids of this size and above are refused when they are read.
        skip_bad_documents: a document that cannot be read is padding in its place, and named in `Sample.unreadable`.
    Raises:
        DataError: see `find_train_files` and `TokenizedFile`; or no file is long enough for one sample, or no document
            has two tokens.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        seq_len: int,
        micro_bsz: int,
        packing: Packing,
        vocab_size: int | None = None,
        min_length: int = 0,
        min_length_dict: Mapping[str, int] | None = None,
        skip_bad_documents: bool = False,
    ) -> None:
        files, self.type_names = find_train_files(folder)
        limits = dict(min_length_dict or {})
        for name in limits:
            if name not in self.type_names:
                raise DataError(
                    f"min_length_dict names the type '{name}', but {folder} has {self.type_names}."
                    + nearest(name, self.type_names)
                )
        self.seq_len, self.micro_bsz, self.packing, self.vocab_size = seq_len, micro_bsz, packing, vocab_size
        self.skip_bad_documents = skip_bad_documents
        unpacked = packing == "unpacked"
        self.places_per_sample = micro_bsz if unpacked else micro_bsz * seq_len
        self._entries: list[_FileEntry] = []
        counts, tokens, dropped, num_documents = [], 0, 0, 0
        for file in files:
            limit = limits.get(self.type_names[file.type_id], min_length)
            summary = summarize(file.path, limit)
            places = summary.kept_documents if unpacked else summary.kept_tokens
            if unpacked:
                count = -(-places // self.places_per_sample)
            else:
                count = places // self.places_per_sample
                dropped += places % self.places_per_sample
            tokens += summary.kept_tokens
            num_documents += summary.kept_documents
            self._entries.append(_FileEntry(file.path, file.type_id, limit, places))
            counts.append(count)
        self._ends = np.cumsum(counts)
        self.num_tokens = tokens
        self._open: OrderedDict[int, tuple[TokenizedFile, DocumentIndex]] = OrderedDict()
        if len(self) == 0:
            unit = "documents" if unpacked else "tokens (micro_bsz * seq_len)"
            raise DataError(
                f"{folder}: {len(files)} .bin files with {tokens} tokens (min_length applied), but none holds "
                f"one whole sample of {self.places_per_sample} {unit}. "
                "Lower data.micro_bsz, data.seq_len or data.min_length, or join small files"
            )
        if tokens == num_documents:
            raise DataError(
                f"{folder}: each of the {num_documents} documents has one token alone, and the last token of a "
                "document predicts nothing: there is nothing to learn. Tokenize longer documents"
            )
        if dropped * 100 > tokens:
            get_logger(__name__).info(
                "%s: %d of %d tokens are left out (the incomplete sample at the end of each of %d files)",
                folder,
                dropped,
                tokens,
                len(files),
            )

    @property
    def facts(self) -> Mapping[str, Any]:
        """See `SampleSource`."""
        return {"packing": self.packing, "seq_len": self.seq_len, "micro_bsz": self.micro_bsz}

    def __len__(self) -> int:
        """Number of samples of one epoch."""
        return int(self._ends[-1])

    def sample(self, index: int) -> Sample:
        """Sample `index` in [0, len).

        Raises:
            DataError: a document of the sample is malformed.
        """
        file_index = int(np.searchsorted(self._ends, index, side="right"))
        entry = self._entries[file_index]
        within = index - (int(self._ends[file_index - 1]) if file_index else 0)
        file, documents = self._opened(file_index)
        start = within * self.places_per_sample
        stop = min(start + self.places_per_sample, entry.places)
        found, starts = documents.locate(start, stop)
        if self.packing == "unpacked":
            rows = [self._piece(file, int(document), 0, self.seq_len) for document in found]
            return stack_slices(rows, self.seq_len, self.micro_bsz, entry.type_id)
        pieces = [
            self._piece(file, int(document), max(start - int(begin), 0), stop - int(begin))
            for document, begin in zip(found, starts, strict=True)
        ]
        return concatenate_slices(pieces, self.seq_len, self.places_per_sample, self.packing, entry.type_id)

    def padding(self) -> Sample:
        """A sample of padding alone."""
        return padding_sample(self.seq_len, self.micro_bsz, self.packing)

    def _piece(self, file: TokenizedFile, document: int, start: int, stop: int) -> DocumentSlice:
        count = int(file.counts(document, document + 1)[0])
        stop = min(stop, count)
        try:
            # One token more, if the document has it: the label at a cut is the real next token.
            piece = make_slice(*file.read(document, start, stop + 1), stop - start)
            if self.packing == "unpacked" and stop < count and (piece.labels == IGNORE_INDEX).all():
                piece.is_truncated_answer = bool(file.read(document, stop + 1)[1].any())
        except DataError as error:
            if not self.skip_bad_documents:
                raise
            return unreadable_slice(0 if self.packing == "unpacked" else stop - start, str(error))
        return piece

    def _opened(self, file_index: int) -> tuple[TokenizedFile, DocumentIndex]:
        if file_index in self._open:
            self._open.move_to_end(file_index)
            return self._open[file_index]
        entry = self._entries[file_index]
        file = TokenizedFile(entry.path, self.vocab_size)
        opened = (file, DocumentIndex(file, entry.min_length, count_documents=self.packing == "unpacked"))
        self._open[file_index] = opened
        if len(self._open) > _OPEN_FILES:
            self._open.popitem(last=False)
        return opened
