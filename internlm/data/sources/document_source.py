"""Samples of the files of documents in a train folder: `sample(i)` for i in [0, N), packed on demand.

Owns the map from a sample's index to its documents. Must not know order, ranks or batches.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from internlm.data.batch import IGNORE_INDEX
from internlm.data.documents.document_file import DocumentFile, FileFormat
from internlm.data.documents.document_index import DocumentIndex, summarize
from internlm.data.documents.folders import find_train_files
from internlm.data.packing.document_slice import DocumentSlice, make_slice, unreadable_slice
from internlm.data.packing.sample import Packing, Sample, concatenate_slices, padding_sample, stack_slices
from internlm.utils.errors import DataError, nearest
from internlm.utils.logging import get_logger

_MAX_OPEN_FILES = 128
"""Each open file takes three descriptors; the usual limit of a process is 1024."""


@dataclass(frozen=True)
class _FileEntry:
    path: Path
    type_id: int
    min_length: int
    length: int
    """Tokens (packed) or documents (unpacked) after the min_length filter."""


class DocumentSource:
    """The samples of the files of one format in a train folder.

    Packed: the shuffled documents of a file are concatenated and cut every P = micro_bsz * seq_len tokens; the
    incomplete last sample of each file is dropped. Unpacked: a sample has micro_bsz documents, each truncated at
    seq_len tokens; the last sample of a file may have fewer.

    Args:
        folder: see `find_train_files`.
        format: of the files.
        seq_len: maximum length of an attention segment, in tokens.
        micro_bsz: rows of a micro-batch.
        packing: see doc/data.md.
        vocab_size: ids must be smaller; checked as documents are read. None accepts any.
        min_length: minimum number of tokens; shorter documents are dropped.
        min_length_dict: type name -> minimum that replaces `min_length` for that type.
        skip_bad_documents: replace a document that cannot be read by padding of the same length, and report it in
            `Sample.unreadable`.

    Raises:
        DataError: the folder or a file is malformed, no file is long enough for one sample, or no document has two
            tokens.
    """

    def __init__(
        self,
        folder: str | Path,
        format: FileFormat,
        *,
        seq_len: int,
        micro_bsz: int,
        packing: Packing,
        vocab_size: int | None = None,
        min_length: int = 0,
        min_length_dict: Mapping[str, int] | None = None,
        skip_bad_documents: bool = False,
    ) -> None:
        files, self.type_names = find_train_files(folder, format)
        self._format = format
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
        self._sample_length = micro_bsz if unpacked else micro_bsz * seq_len
        self._entries: list[_FileEntry] = []
        counts, num_tokens, num_dropped, num_documents = [], 0, 0, 0
        for file in files:
            limit = limits.get(self.type_names[file.type_id], min_length)
            summary = summarize(format.open(file.path), limit)
            length = summary.kept_documents if unpacked else summary.kept_tokens
            if unpacked:
                count = -(-length // self._sample_length)
            else:
                count = length // self._sample_length
                num_dropped += length % self._sample_length
            num_tokens += summary.kept_tokens
            num_documents += summary.kept_documents
            self._entries.append(_FileEntry(file.path, file.type_id, limit, length))
            counts.append(count)
        self._ends = np.cumsum(counts)
        self.num_tokens = num_tokens
        self._open: OrderedDict[int, tuple[DocumentFile, DocumentIndex]] = OrderedDict()
        if len(self) == 0:
            unit = "documents" if unpacked else "tokens (micro_bsz * seq_len)"
            raise DataError(
                f"{folder}: {len(files)} files with {num_tokens} tokens (after min_length), but none has "
                f"enough for one sample of {self._sample_length} {unit}. "
                "Lower data.micro_bsz, data.seq_len or data.min_length, or merge small files"
            )
        if num_tokens == num_documents:
            raise DataError(
                f"{folder}: each of the {num_documents} documents has a single token, and the last token of a document "
                "has no label, so there is nothing to learn. Tokenize longer documents"
            )
        if num_dropped * 100 > num_tokens:
            get_logger(__name__).info(
                "%s: %d of %d tokens are dropped (the incomplete last sample of each of %d files)",
                folder,
                num_dropped,
                num_tokens,
                len(files),
            )

    @property
    def facts(self) -> Mapping[str, Any]:
        """See `SampleSource`."""
        return {
            "type": self._format.name,
            "packing": self.packing,
            "seq_len": self.seq_len,
            "micro_bsz": self.micro_bsz,
        }

    def __len__(self) -> int:
        """Samples of one epoch."""
        return int(self._ends[-1])

    def sample(self, index: int) -> Sample:
        """Read and pack sample `index` in [0, len).

        Raises:
            DataError: a document of the sample is malformed.
        """
        file_index = int(np.searchsorted(self._ends, index, side="right"))
        entry = self._entries[file_index]
        within = index - (int(self._ends[file_index - 1]) if file_index else 0)
        file, index_of_file = self._open_file(file_index)
        start = within * self._sample_length
        stop = min(start + self._sample_length, entry.length)
        documents, starts = index_of_file.locate(start, stop)
        if self.packing == "unpacked":
            rows = [self._read_slice(file, int(document), 0, self.seq_len) for document in documents]
            return stack_slices(rows, self.seq_len, self.micro_bsz, entry.type_id)
        slices = [
            self._read_slice(file, int(document), max(start - int(begin), 0), stop - int(begin))
            for document, begin in zip(documents, starts, strict=True)
        ]
        return concatenate_slices(slices, self.seq_len, self._sample_length, self.packing, entry.type_id)

    def padding(self) -> Sample:
        """Return a sample of padding alone."""
        return padding_sample(self.seq_len, self.micro_bsz, self.packing)

    def _read_slice(self, file: DocumentFile, document: int, start: int, stop: int) -> DocumentSlice:
        count = int(file.counts(document, document + 1)[0])
        stop = min(stop, count)
        try:
            # One more token, if the document has it: the label at a cut is the next token of the document.
            result = make_slice(*file.read(document, start, stop + 1), stop - start)
            if self.packing == "unpacked" and stop < count and (result.labels == IGNORE_INDEX).all():
                result.is_truncated_answer = bool(file.read(document, stop + 1)[1].any())
        except DataError as error:
            if not self.skip_bad_documents:
                raise
            return unreadable_slice(0 if self.packing == "unpacked" else stop - start, str(error))
        return result

    def _open_file(self, file_index: int) -> tuple[DocumentFile, DocumentIndex]:
        if file_index in self._open:
            self._open.move_to_end(file_index)
            return self._open[file_index]
        entry = self._entries[file_index]
        file = self._format.open(entry.path, self.vocab_size)
        opened = (file, DocumentIndex(file, entry.min_length, count_documents=self.packing == "unpacked"))
        self._open[file_index] = opened
        if len(self._open) > _MAX_OPEN_FILES:
            self._open.popitem(last=False)
        return opened
