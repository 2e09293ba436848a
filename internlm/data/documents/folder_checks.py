"""Checks folders of documents before a run: ids outside the vocabulary, damaged lines, validation sets without labels.

Owns how much is read: small sets entirely, of large ones documents at equal intervals over all files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from internlm.data.documents.document_file import DocumentFile, FileFormat
from internlm.data.documents.document_index import summarize
from internlm.data.documents.folders import find_train_files
from internlm.data.documents.valid_sets import ValidSet
from internlm.data.images.document_images import DocumentsWithImages
from internlm.data.remote.local_file import find_mirrored
from internlm.utils.errors import DataError

MAX_TOKENS = 32_000_000
"""Tokens to read over all sets; takes about a second."""

MAX_TOKENS_PER_DOCUMENT = 65_536
"""Tokens to read at the start of each chosen document, in sets that are not read entirely."""


@dataclass(frozen=True)
class FolderCheck:
    """The result of checking a set of files.

    Attributes:
        name: name of the set.
        num_documents, num_tokens: size of the files.
        num_read: number of tokens that were read.
    """

    name: str
    num_documents: int
    num_tokens: int
    num_read: int

    def __str__(self) -> str:
        size = f"{self.num_documents:,} documents, {self.num_tokens:,} tokens"
        if self.num_read == self.num_tokens:
            return f"{self.name}: {size}, all read"
        return f"{self.name}: {size}, of which {self.num_read:,} were read, spread evenly over the documents"


def check_valid_sets(sets: Sequence[ValidSet], vocab_size: int | None) -> list[FolderCheck]:
    """Check every validation set.

    Args:
        sets: to check.
        vocab_size: ids must be smaller; None accepts any.

    Raises:
        DataError: a file is malformed, or a set has no token that contributes loss.
    """
    results = []
    for each in sets:
        files = [_File.of(file) for file in each.open(vocab_size)]
        checked, has_label = _check(f"validation set '{each.name}'", files, MAX_TOKENS // len(sets))
        if not has_label and not _has_label(files):
            raise DataError(
                f"{checked.name} ({each.place}): no token contributes loss: every document has fewer than two tokens, "
                f"or only negative (masked) ones. Tokenize it again, or remove it from {each.origin}"
            )
        results.append(checked)
    return results


def check_train_folder(folder: str | Path, format: FileFormat, vocab_size: int | None) -> FolderCheck:
    """Check the files of a train folder; see `find_train_files`.

    Raises:
        DataError: a file is malformed, has an id outside the vocabulary, or no token contributes loss.
    """
    found, _ = find_train_files(folder, format)
    summaries = [summarize(format.open(file.path), 0) for file in found]
    files = [
        _File(
            summary.documents,
            summary.kept_tokens,
            partial(format.open, file.path, vocab_size),
            # Each file in an object store would be fetched whole.
            is_read=file is found[0] or find_mirrored(file.path) is None,
        )
        for file, summary in zip(found, summaries, strict=True)
    ]
    checked, has_label = _check(f"train folder '{folder}'", files, MAX_TOKENS)
    if not has_label and not _has_label([file for file in files if file.is_read]):
        raise DataError(
            f"{folder}: no token contributes loss: every document has fewer than two tokens, or only masked ones; "
            "tokenize it again"
        )
    return checked


@dataclass(frozen=True)
class _File:
    num_documents: int
    num_tokens: int
    open: Callable[[], DocumentFile]
    is_read: bool = True

    @classmethod
    def of(cls, file: DocumentFile) -> _File:
        """A file that is open already."""
        return cls(len(file), int(file.counts().sum()), lambda: file)


def _check(name: str, files: Sequence[_File], max_tokens: int) -> tuple[FolderCheck, bool]:
    """Read documents of a set; also returns whether one has a label."""
    num_tokens = sum(file.num_tokens for file in files)
    # Every `stride`-th document is read, counted over all files.
    stride = max(1, -(-num_tokens // max_tokens))
    limit = None if stride == 1 else MAX_TOKENS_PER_DOCUMENT
    num_documents = num_read = 0
    has_label = False
    for each in files:
        chosen = range(-num_documents % stride, each.num_documents if each.is_read else 0, stride)
        num_documents += each.num_documents
        file = each.open() if chosen else None
        for document in chosen:
            assert file is not None
            ids, loss_mask = file.read(document, 0, limit)
            if isinstance(file, DocumentsWithImages):
                for source in file.images(document):
                    source.check()
            num_read += len(ids)
            has_label = has_label or bool(loss_mask[1:].any())
    return FolderCheck(name, num_documents, num_tokens, num_read), has_label


def _has_label(files: Sequence[_File]) -> bool:
    """Whether any document has a label. Reads up to the first one, if the chosen documents had none, which is rare."""
    opened = (each.open() for each in files)
    return any(bool(file.read(document)[1][1:].any()) for file in opened for document in range(len(file)))
