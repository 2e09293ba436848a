"""Finds everything that is corrupt or out of range in files of documents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from internlm.data.documents.document_file import DocumentFile
from internlm.data.tools.input_documents import Inputs
from internlm.data.tools.parquet_documents import read_parquet
from internlm.utils.errors import DataError

_SLICE = 1 << 20
"""Tokens of a document in memory at once."""


@dataclass
class FileReport:
    """What was found in a file.

    Attributes:
        path: the file.
        documents, tokens: read without a problem.
        num_masked: tokens without loss among them.
        num_empty: documents without a token.
        largest_id: -1 if there is no token.
        problems: the first ones, each with document and offset.
        num_problems: number of all, one a document.
    """

    path: Path
    documents: int = 0
    tokens: int = 0
    num_masked: int = 0
    num_empty: int = 0
    largest_id: int = -1
    problems: list[str] = field(default_factory=list)
    num_problems: int = 0

    def add_problem(self, text: str, limit: int) -> None:
        """Count a problem, and keep its text if there is room."""
        self.num_problems += 1
        if len(self.problems) < limit:
            self.problems.append(text)


def verify_files(inputs: Inputs, vocab_size: int | None, limit: int) -> Iterator[FileReport]:
    """Read every document of every file.

    Args:
        inputs: the files.
        vocab_size: ids must be smaller; None accepts any.
        limit: number of problems of a file whose texts are kept.
    """
    for path in inputs.paths:
        report = FileReport(path)
        try:
            if inputs.format is None:
                _read_rows(report, vocab_size, limit)
            else:
                _read_file(report, inputs.open(path, vocab_size), limit)
        except DataError as error:
            report.add_problem(str(error), limit)
        yield report


def _read_file(report: FileReport, file: DocumentFile, limit: int) -> None:
    for number in range(len(file)):
        try:
            file.check_offsets(number, number + 1)
            count = int(file.counts(number, number + 1)[0])
            masked, largest = 0, -1
            # An empty document is read as well: its line may be malformed.
            for start in range(0, max(count, 1), _SLICE):
                ids, loss_mask = file.read(number, start, min(start + _SLICE, count))
                masked += len(ids) - int(loss_mask.sum())
                largest = max(largest, int(ids.max(initial=-1)))
        except DataError as error:
            report.add_problem(str(error), limit)
            continue
        report.documents += 1
        report.tokens += count
        report.num_masked += masked
        report.num_empty += not count
        report.largest_id = max(report.largest_id, largest)


def _read_rows(report: FileReport, vocab_size: int | None, limit: int) -> None:
    for row, (ids, loss_mask) in enumerate(read_parquet(report.path)):
        smallest, largest = int(ids.min(initial=0)), int(ids.max(initial=-1))
        if smallest < 0 or (vocab_size is not None and largest >= vocab_size):
            wrong = smallest if smallest < 0 else largest
            report.add_problem(f"{report.path}: row {row}: token {wrong} is outside the vocabulary", limit)
            continue
        report.documents += 1
        report.tokens += len(ids)
        report.num_masked += len(ids) - int(loss_mask.sum())
        report.num_empty += not len(ids)
        report.largest_id = max(report.largest_id, largest)
