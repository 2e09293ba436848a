"""Reads tokenized files as a run would, before it does: ids outside the vocabulary, damaged lines, sets without labels.

Owns how much is read. Small sets are read whole; of large ones, documents spread evenly over all files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from internlm.data.tokenized_files.document_index import summarize
from internlm.data.tokenized_files.folders import find_train_files, find_valid_sets
from internlm.data.tokenized_files.reader import TokenizedFile
from internlm.utils.errors import DataError

MAX_TOKENS = 32_000_000
"""Tokens that are read of all sets together: about a second."""

MAX_TOKENS_A_DOCUMENT = 65_536
"""Of a set that is not read whole, tokens at the start of each document that is."""


@dataclass(frozen=True)
class Checked:
    """What was read of a set of files.

    Attributes:
        name: of the set.
        num_documents, num_tokens: in the files.
        num_read: tokens that were read.
    """

    name: str
    num_documents: int
    num_tokens: int
    num_read: int

    def __str__(self) -> str:
        what = f"{self.num_documents:,} documents, {self.num_tokens:,} tokens"
        if self.num_read == self.num_tokens:
            return f"{self.name}: {what}, all read"
        return f"{self.name}: {what}, of which {self.num_read:,} were read, spread evenly over the documents"


def check_valid_folder(folder: str | Path, vocab_size: int | None) -> list[Checked]:
    """Read every valid set of a folder.

    Args:
        folder: see `find_valid_sets`.
        vocab_size: ids of this size and above are errors.

    Raises:
        DataError: a file is malformed, or a set has no token that contributes loss.
    """
    sets = find_valid_sets(folder)
    return [
        _check(f"valid set '{name}'", paths, vocab_size, MAX_TOKENS // len(sets), needs_label=True)
        for name, paths in sets.items()
    ]


def check_train_folder(folder: str | Path, vocab_size: int | None) -> Checked:
    """Read the files of a train folder; see `find_train_files`.

    Raises:
        DataError: a file is malformed.
    """
    files, _ = find_train_files(folder)
    paths = [file.path for file in files]
    return _check(f"train folder '{folder}'", paths, vocab_size, MAX_TOKENS, needs_label=False)


def _check(name: str, paths: Sequence[Path], vocab_size: int | None, most: int, *, needs_label: bool) -> Checked:
    summaries = [summarize(path, 0) for path in paths]
    num_tokens = sum(summary.kept_tokens for summary in summaries)
    # One document in `stride` is read, counted over all files.
    stride = max(1, -(-num_tokens // most))
    limit = None if stride == 1 else MAX_TOKENS_A_DOCUMENT
    num_documents = num_read = 0
    has_label = False
    for path, summary in zip(paths, summaries, strict=True):
        chosen = range(-num_documents % stride, summary.documents, stride)
        num_documents += summary.documents
        file = TokenizedFile(path, vocab_size) if chosen else None
        for document in chosen:
            assert file is not None
            ids, loss_mask = file.read(document, 0, limit)
            num_read += len(ids)
            has_label = has_label or bool(loss_mask[1:].any())
    if needs_label and not has_label and not _has_label(paths, vocab_size):
        raise DataError(
            f"{name} ({paths[0].parent}): no token contributes loss: every document has fewer than two tokens, or all "
            "its tokens are negative (masked). Tokenize it again, or remove it from data.valid_folder"
        )
    return Checked(name, num_documents, num_tokens, num_read)


def _has_label(paths: Sequence[Path], vocab_size: int | None) -> bool:
    """Whether any document has one: the rare set of which the documents read had none is read to its first label."""
    files = (TokenizedFile(path, vocab_size) for path in paths)
    return any(bool(file.read(document)[1][1:].any()) for file in files for document in range(len(file)))
