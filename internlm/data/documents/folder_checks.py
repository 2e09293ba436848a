"""Checks folders of documents before a run: ids outside the vocabulary, damaged lines, validation sets without labels.

Owns how much is read: small sets entirely, of large ones documents at equal intervals over all files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from internlm.data.documents.document_file import FileFormat
from internlm.data.documents.document_index import summarize
from internlm.data.documents.folders import find_train_files, find_valid_sets
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


def check_valid_folder(folder: str | Path, format: FileFormat, vocab_size: int | None) -> list[FolderCheck]:
    """Check every validation set of a folder.

    Args:
        folder: see `find_valid_sets`.
        format: of its files.
        vocab_size: ids must be smaller; None accepts any.

    Raises:
        DataError: a file is malformed, or a set has no token that contributes loss.
    """
    sets = find_valid_sets(folder, format)
    return [
        _check(f"validation set '{name}'", paths, format, vocab_size, MAX_TOKENS // len(sets), needs_label=True)
        for name, paths in sets.items()
    ]


def check_train_folder(folder: str | Path, format: FileFormat, vocab_size: int | None) -> FolderCheck:
    """Check the files of a train folder; see `find_train_files`.

    Raises:
        DataError: a file is malformed, or has an id outside the vocabulary.
    """
    files, _ = find_train_files(folder, format)
    paths = [file.path for file in files]
    return _check(f"train folder '{folder}'", paths, format, vocab_size, MAX_TOKENS, needs_label=False)


def _check(
    name: str, paths: Sequence[Path], format: FileFormat, vocab_size: int | None, max_tokens: int, *, needs_label: bool
) -> FolderCheck:
    summaries = [summarize(format.open(path), 0) for path in paths]
    num_tokens = sum(summary.kept_tokens for summary in summaries)
    # Every `stride`-th document is read, counted over all files.
    stride = max(1, -(-num_tokens // max_tokens))
    limit = None if stride == 1 else MAX_TOKENS_PER_DOCUMENT
    num_documents = num_read = 0
    has_label = False
    for path, summary in zip(paths, summaries, strict=True):
        chosen = range(-num_documents % stride, summary.documents, stride)
        if not needs_label and path != paths[0] and find_mirrored(path) is not None:
            # Each file would be fetched whole.
            chosen = range(0)
        num_documents += summary.documents
        file = format.open(path, vocab_size) if chosen else None
        for document in chosen:
            assert file is not None
            ids, loss_mask = file.read(document, 0, limit)
            num_read += len(ids)
            has_label = has_label or bool(loss_mask[1:].any())
    if needs_label and not has_label and not _has_label(paths, format, vocab_size):
        raise DataError(
            f"{name} ({paths[0].parent}): no token contributes loss: every document has fewer than two tokens, or only "
            "negative (masked) ones. Tokenize it again, or remove it from data.valid_folder"
        )
    return FolderCheck(name, num_documents, num_tokens, num_read)


def _has_label(paths: Sequence[Path], format: FileFormat, vocab_size: int | None) -> bool:
    """Whether any document has a label. Reads up to the first one, if the chosen documents had none, which is rare."""
    files = (format.open(path, vocab_size) for path in paths)
    return any(bool(file.read(document)[1][1:].any()) for file in files for document in range(len(file)))
