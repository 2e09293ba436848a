"""The number of labels of a validation set, and of the bytes of text that they stand for; cached per file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from internlm.data.documents.document_file import DocumentFile
from internlm.data.documents.index_cache import cached_or_built
from internlm.data.tokenize.token_bytes import Decode, TokenBytes
from internlm.utils.errors import DataError

_PART = 1 << 20
"""Tokens of a document that are read at once."""
_CHECKED_TOKENS = 200_000
"""Tokens at the beginning of a file whose bytes are compared with those of decoded text."""


@dataclass(frozen=True)
class LabelBytes:
    """What a loss per byte is computed from.

    Attributes:
        labels: tokens that contribute loss.
        bytes: UTF-8 bytes of their text.
    """

    labels: int
    bytes: int


def count_label_bytes(
    files: Sequence[DocumentFile],
    table: TokenBytes,
    decode: Decode,
    fingerprint: str,
    image_token_id: int | None = None,
) -> LabelBytes:
    """Count the labels of a set and their bytes, as a loader of validation sets reads them.

    Args:
        files: of the set.
        table: bytes by token.
        decode: decodes ids to text, to verify the table.
        fingerprint: of the tokenizer; part of the name of the cached result.
        image_token_id: id of the placeholders of pictures, which are never labels; may lie outside of the vocabulary.

    Raises:
        DataError: the bytes are not known, or a document is malformed.
    """
    counts = [_count_file(file, table, decode, fingerprint, image_token_id) for file in files]
    return LabelBytes(sum(each.labels for each in counts), sum(each.bytes for each in counts))


def _count_file(
    file: DocumentFile, table: TokenBytes, decode: Decode, fingerprint: str, image_token_id: int | None
) -> LabelBytes:
    kind = f"label_bytes-{fingerprint}"

    def write(target: Path) -> None:
        target.write_text(json.dumps(asdict(_read_file(file, table, decode, image_token_id))))

    return LabelBytes(**json.loads(cached_or_built(file, kind, ".json", write).read_text()))


def _read_file(file: DocumentFile, table: TokenBytes, decode: Decode, image_token_id: int | None) -> LabelBytes:
    num_labels = num_bytes = num_checked = 0
    for document, length in enumerate(file.counts().tolist()):
        for start in range(0, length - 1, _PART):
            ids, loss_mask = file.read(document, start, start + _PART + 1)
            if image_token_id is not None:
                ids = table.with_special(ids, image_token_id)
            if start == 0 and num_checked < _CHECKED_TOKENS:
                table.check(ids[: _CHECKED_TOKENS - num_checked].tolist(), decode)
                num_checked += len(ids)
            try:
                num_bytes += table.count(ids, loss_mask, starts_document=start == 0)
            except DataError as error:
                raise DataError(f"{file.path}: document {document}: {error}") from error
            num_labels += int(loss_mask[1:].sum())
    return LabelBytes(num_labels, num_bytes)
