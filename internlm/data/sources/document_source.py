"""Samples of the files of documents in a train folder: `sample(i)` for i in [0, N), packed on demand.

Owns the map from a sample's index to its documents. Must not know order, ranks or batches.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internlm.data.documents.best_fit_index import BestFitIndex
from internlm.data.documents.document_file import DocumentFile, FileFormat, TypedFile
from internlm.data.documents.document_index import DocumentIndex, FileSummary, summarize
from internlm.data.documents.file_digest import digest_of
from internlm.data.documents.folders import find_train_files, min_length_of_type
from internlm.data.documents.held_out import num_held_out
from internlm.data.images.document_images import DocumentsWithImages
from internlm.data.packing.document_slice import padding_slice
from internlm.data.packing.fill_in_the_middle import NUM_SENTINELS, FillInTheMiddle
from internlm.data.packing.sample import (
    Packing,
    Sample,
    check_document_mask,
    concatenate_slices,
    padding_sample,
    stack_slices,
)
from internlm.data.remote.fetch_ahead import FetchAhead, size_to_fetch
from internlm.data.sources.slice_reader import SliceReader
from internlm.utils.errors import ConfigError, DataError
from internlm.utils.logging import get_logger

_MAX_OPEN_FILES = 128
"""Each open file takes three descriptors; the usual limit of a process is 1024."""
_MAX_WHOLE_DOCUMENT = 1 << 20
"""Tokens of a document that is read entirely for each of its samples."""

logger = get_logger(__name__)


@dataclass(frozen=True)
class _FileEntry:
    path: Path
    type_id: int
    min_length: int
    held_out: int
    sizes: tuple[int, ...]
    """Of the inputs of the file when the source was built, in bytes."""
    length: int
    """Of what is neither held out nor shorter than min_length: tokens (packed), documents (unpacked) or bins."""


class DocumentSource:
    """The samples of the files of one format in a train folder.

    Packed: the shuffled documents of a file are concatenated and cut every P = micro_bsz * seq_len tokens; the
    incomplete last sample of each file is dropped. Unpacked: a sample has micro_bsz documents, each truncated at
    seq_len tokens; the last sample of a file may have fewer. Best fit: documents of up to seq_len tokens remain whole,
    and nothing is dropped; a sample is one bin of P tokens or, without a document mask, micro_bsz bins of seq_len.

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
        document_mask: whether attention stays within documents; None: the default of the packing.
        fim: fill-in-the-middle.
        valid_fraction: share of the documents of each file that are held out; see `num_held_out`.

    Raises:
        DataError: the folder or a file is malformed, no file is long enough for one sample, no document has two
            tokens, or a document is too long for fill-in-the-middle at document level.
        ConfigError: `document_mask` contradicts `packing`, or a sentinel of `fim` is outside the vocabulary.
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
        document_mask: bool | None = None,
        fim: FillInTheMiddle | None = None,
        valid_fraction: float = 0.0,
    ) -> None:
        self.valid_fraction, self._folder = valid_fraction, folder
        self.seq_len, self.micro_bsz, self.packing, self.vocab_size = seq_len, micro_bsz, packing, vocab_size
        self.skip_bad_documents, self.fim = skip_bad_documents, fim
        self.document_mask = check_document_mask(packing, document_mask)
        self._format = format
        # Without a document mask, attention segments are rows, so a document that remains whole must be within one.
        self._capacity = micro_bsz * seq_len if self.document_mask else seq_len
        if packing == "unpacked":
            self._sample_length = micro_bsz
        elif packing == "best_fit":
            self._sample_length = micro_bsz * seq_len // self._capacity
        else:
            self._sample_length = micro_bsz * seq_len
        files, self.type_names = find_train_files(folder, format)
        limits = [
            min_length_of_type(self.type_names[file.type_id], folder, self.type_names, min_length, min_length_dict)
            for file in files
        ]
        opened = self._open_all(files, limits)
        self._entries = [entry for entry, _ in opened]
        keeps_rest = packing in ("unpacked", "best_fit")
        self._ends = np.cumsum(
            [(entry.length + keeps_rest * (self._sample_length - 1)) // self._sample_length for entry in self._entries]
        )
        summaries = [summary for _, summary in opened]
        self.num_tokens = sum(summary.kept_tokens for summary in summaries)
        self._fetch_ahead = FetchAhead()
        size, bound = size_to_fetch(self.paths)
        self._is_remote = size > 0
        self._fits_cache = size > 0 and (bound is None or size <= bound)
        self._open: OrderedDict[int, tuple[DocumentFile, DocumentIndex | BestFitIndex]] = OrderedDict()
        self._digest = digest_of((entry.path.name, entry.sizes) for entry in self._entries)
        self._check_tokens(folder, sum(summary.kept_documents for summary in summaries))
        if fim is not None:
            self._check_fim(fim, files, summaries)
        self._log_size(folder)

    @property
    def facts(self) -> Mapping[str, Any]:
        """See `SampleSource`."""
        return {
            "type": self._format.name,
            "packing": self.packing,
            "document_mask": self.document_mask,
            "fim": None if self.fim is None else self.fim.facts,
            "seq_len": self.seq_len,
            "micro_bsz": self.micro_bsz,
            "valid_fraction": self.valid_fraction,
            "files": self._digest,
        }

    def __len__(self) -> int:
        """Samples of one epoch."""
        return int(self._ends[-1])

    def sample(self, index: int, epoch: int = 0) -> Sample:
        """Read and pack sample `index`.

        Args:
            index: in [0, len).
            epoch: the documents are those of every epoch, with the draws of fill-in-the-middle of this one.

        Raises:
            DataError: a document of the sample is malformed, or its file has vanished or changed its size since the
                source was built.
        """
        file_index = int(np.searchsorted(self._ends, index, side="right"))
        entry = self._entries[file_index]
        within = index - (int(self._ends[file_index - 1]) if file_index else 0)
        start = within * self._sample_length
        stop = min(start + self._sample_length, entry.length)
        try:
            file, index_of_file = self._open_file(file_index)
        except DataError as error:
            if not self.skip_bad_documents:
                raise
            return replace(self.padding(), unreadable=(str(error),))
        reader = SliceReader(
            file,
            (epoch, file_index),
            seq_len=self.seq_len,
            is_unpacked=self.packing == "unpacked",
            skip_bad_documents=self.skip_bad_documents,
            fim=self.fim,
        )
        if isinstance(index_of_file, BestFitIndex):
            slices = []
            for number in range(start, stop):
                pieces = [
                    reader.read(int(document), int(first), int(first) + self.seq_len)
                    for document, first in zip(*index_of_file.pieces(number), strict=True)
                ]
                filled = sum(len(piece.input_ids) for piece in pieces)
                slices += [*pieces, padding_slice(self._capacity - filled)]
        else:
            documents, starts = index_of_file.locate(start, stop)
            if self.packing == "unpacked":
                rows = [reader.read(int(document), 0, self.seq_len) for document in documents]
                return stack_slices(rows, self.seq_len, self.micro_bsz, entry.type_id)
            slices = [
                reader.read(
                    int(document),
                    max(start - int(begin), 0),
                    stop - int(begin),
                    0 if self.document_mask else max(int(begin) - start, 0) % self.seq_len,
                )
                for document, begin in zip(documents, starts, strict=True)
            ]
        total = self.micro_bsz * self.seq_len
        return concatenate_slices(slices, self.seq_len, total, self.packing, entry.type_id, self.document_mask)

    @property
    def file_ends(self) -> NDArray[np.int64]:
        """Number of samples of the files up to each one: int64 [files]."""
        return self._ends

    @property
    def paths(self) -> list[Path]:
        """The files."""
        return [entry.path for entry in self._entries]

    def fetch_ahead(self, files: Sequence[int]) -> None:
        """Fetch these files, of an object store, before they are read; in the background, in this order.

        Without a call, all files are fetched when the first is read, if the cache has room for them.
        """
        if self._is_remote:
            self._fetch_ahead.request([self._entries[number].path for number in files])

    def padding(self) -> Sample:
        """Return a sample of padding alone."""
        return padding_sample(self.seq_len, self.micro_bsz, self.packing, self.document_mask)

    def _open_all(self, files: list[TypedFile], limits: list[int]) -> list[tuple[_FileEntry, FileSummary]]:
        """Results of `_index_file` for all files.

        Processes that open a folder at once begin at different files, so that each builds some of the indices. Not
        threads: NumPy parses headers of .npy files with `ast`, which fails in threads of Python 3.11.
        """
        results: dict[int, tuple[_FileEntry, FileSummary]] = {}
        for position in range(len(files)):
            number = (position + os.getpid()) % len(files)
            results[number] = self._index_file(files[number], limits[number])
        return [results[number] for number in range(len(files))]

    def _index_file(self, typed_file: TypedFile, min_length: int) -> tuple[_FileEntry, FileSummary]:
        """Build the indices of a file."""
        path, type_id = typed_file.path, typed_file.type_id
        file = self._format.open(path)
        if isinstance(file, DocumentsWithImages) and file.left_out:
            logger.warning("%s", file.left_out)
        held_out = num_held_out(len(file), self.valid_fraction, path, self._folder)
        summary = summarize(file, min_length, held_out)
        index = self._index(file, min_length, held_out)
        length = summary.kept_documents if self.packing == "unpacked" else summary.kept_tokens
        if isinstance(index, BestFitIndex):
            length = len(index)
        sizes = tuple(each.stat().st_size for each in file.inputs)
        return _FileEntry(path, type_id, min_length, held_out, sizes, length), summary

    def _index(self, file: DocumentFile, min_length: int, held_out: int) -> DocumentIndex | BestFitIndex:
        if self.packing == "best_fit":
            return BestFitIndex(file, min_length, self.seq_len, self._capacity, held_out)
        return DocumentIndex(file, min_length, self.packing == "unpacked", held_out)

    def _open_file(self, file_index: int) -> tuple[DocumentFile, DocumentIndex | BestFitIndex]:
        entry = self._entries[file_index]
        if file_index in self._open:
            self._open.move_to_end(file_index)
            # Reading a mapped file that has become shorter would kill the process.
            _check_unchanged(self._open[file_index][0], entry)
            return self._open[file_index]
        if self._fits_cache and not self._fetch_ahead.is_started:
            self.fetch_ahead(range(len(self._entries)))
        file = self._format.open(entry.path, self.vocab_size)
        _check_unchanged(file, entry)
        self._open[file_index] = file, self._index(file, entry.min_length, entry.held_out)
        if len(self._open) > _MAX_OPEN_FILES:
            self._open.popitem(last=False)
        return self._open[file_index]

    def _check_tokens(self, folder: str | Path, num_documents: int) -> None:
        if len(self) == 0:
            unit = {"unpacked": "documents", "best_fit": "bins"}.get(self.packing, "tokens (micro_bsz * seq_len)")
            raise DataError(
                f"{folder}: {len(self._entries)} files with {self.num_tokens} tokens (after min_length and "
                f"valid_fraction), but none has enough for one sample of {self._sample_length} {unit}. "
                "Lower data.micro_bsz, data.seq_len or data.min_length, or merge small files"
            )
        if self.num_tokens == num_documents:
            raise DataError(
                f"{folder}: each of the {num_documents} documents has a single token, and the last token of a document "
                "has no label, so there is nothing to learn. Tokenize longer documents"
            )

    def _check_fim(self, fim: FillInTheMiddle, files: list[TypedFile], summaries: list[FileSummary]) -> None:
        for name in ("prefix", "middle", "suffix"):
            sentinel = getattr(fim, name)
            if self.vocab_size is not None and sentinel >= self.vocab_size:
                raise ConfigError(
                    f"data.fim.{name} = {sentinel} is outside model.vocab_size = {self.vocab_size}: give the id of a "
                    "special token of the tokenizer"
                )
        for file, summary in zip(files, summaries, strict=True):
            if fim.level == "document" and summary.longest > _MAX_WHOLE_DOCUMENT:
                raise DataError(
                    f"{file.path}: a document has {summary.longest:,} tokens, and data.fim.level = 'document' reads "
                    f"whole documents of up to {_MAX_WHOLE_DOCUMENT:,}; set data.fim.level = 'context', or split it"
                )
        logger.info(
            "fill-in-the-middle: each transformed %s loses its last %d tokens before eos, which make room for the "
            "sentinels; those without another token remain as they are",
            "document" if fim.level == "document" else "part of a document",
            NUM_SENTINELS,
        )

    def _log_size(self, folder: str | Path) -> None:
        num_places = len(self) * self.micro_bsz * self.seq_len
        if self.packing == "best_fit":
            share = 1 - self.num_tokens / num_places
            logger.info("%s: best-fit packing: %d samples, %.3f %% padding", folder, len(self), 100 * share)
        elif self.packing != "unpacked":
            num_dropped = self.num_tokens - num_places
            if num_dropped * 100 > self.num_tokens:
                logger.info(
                    "%s: %d of %d tokens are dropped (the incomplete last sample of each of %d files)",
                    folder,
                    num_dropped,
                    self.num_tokens,
                    len(self._entries),
                )


def _check_unchanged(file: DocumentFile, entry: _FileEntry) -> None:
    """Check that the inputs of a file have the sizes with which the source was built.

    Raises:
        DataError: one has vanished, or has another size.
    """
    for path, size in zip(file.inputs, entry.sizes, strict=True):
        try:
            found = path.stat().st_size
        except OSError as error:
            raise DataError(
                f"{path} cannot be read any more ({error.strerror}): it was there when this run started. Restore it"
            ) from error
        if found != size:
            raise DataError(
                f"{path} has {found:,} bytes, and had {size:,} when this run started: it has been cut or replaced. "
                "Restore it, or restart the run with the new file"
            )
