"""Turns the documents of a shard into lines of a tokenized file, in a worker process: texts, or conversations.

Owns what is skipped and counted while encoding. Must not know parts and outputs.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from internlm.data.conversations.chat_template import ChatTemplate
from internlm.data.conversations.encoder import ConversationEncoder, ConversationOptions, MaskedTokens
from internlm.data.conversations.row_forms import READ_COLUMNS
from internlm.data.images.image_source import to_json
from internlm.data.images.placeholder_tokenizer import PlaceholderTokenizer
from internlm.data.images.row_images import images_of_row
from internlm.data.images.settings import ImageSettings
from internlm.data.tokenize.row_inputs import read_rows
from internlm.data.tokenize.text_inputs import Extent, TextOptions, read_documents
from internlm.data.tokenize.text_tokenizer import TextTokenizer, load_tokenizer
from internlm.data.tokenized_files.writer import encode_line, encode_masked_line
from internlm.utils.errors import DataError

_BATCH_CHARACTERS = 1 << 18
"""Characters of a batch of texts: enough to amortize a call, few enough to fit the caches."""
_NO_TOKEN = "texts without a token"
_NO_LABEL = "conversations without an answer to learn from"
BAD_ROWS = "rows that cannot be used"
"""Rows that `on_bad_data = "skip"` skips and counts."""
_MAX_MESSAGES = 4


@dataclass
class ShardCounts:
    """Counts while a shard is encoded.

    Attributes:
        content: number of skipped or suspicious texts, by kind.
        by_file: number of documents, by input file.
        bad_rows: the errors of the first few rows that were skipped.
    """

    content: Counter[str] = field(default_factory=Counter)
    by_file: Counter[str] = field(default_factory=Counter)
    bad_rows: list[str] = field(default_factory=list)


class ShardEncoder(Protocol):
    """Encodes the documents of shards."""

    def encode(self, shard: tuple[Extent, ...], counts: ShardCounts) -> Iterator[tuple[str, bytes, int]]:
        """Iterate over (text that identifies the document, its line, number of tokens)."""


class TextShardEncoder:
    """Encodes plain text.

    Args:
        tokenizer: the tokenizer.
        text: how documents are found.
        before, after: ids to put before and after every document.
    """

    def __init__(self, tokenizer: TextTokenizer, text: TextOptions, before: list[int], after: list[int]) -> None:
        self._tokenizer, self._text = tokenizer, text
        self._before, self._after = before, after

    def encode(self, shard: tuple[Extent, ...], counts: ShardCounts) -> Iterator[tuple[str, bytes, int]]:
        """See `ShardEncoder`."""
        for texts in _batches(self._documents(shard, counts)):
            for text, ids in zip(texts, self._tokenizer.encode_batch(texts), strict=True):
                if ids:
                    document = self._before + ids + self._after
                    yield text, encode_line(document), len(document)
                else:
                    counts.content[_NO_TOKEN] += 1

    def _documents(self, shard: tuple[Extent, ...], counts: ShardCounts) -> Iterator[str]:
        for extent in shard:
            for text in read_documents(extent, self._text, counts.content):
                counts.by_file[extent.path] += 1
                yield text


class ConversationShardEncoder:
    """Encodes rows of conversations.

    Args:
        encoder: encodes one row.
        skip_bad_rows: whether rows that cannot be used are skipped and counted, instead of ending the run.
        images: of the placeholders, which `encoder` writes; None: rows have no pictures.
    """

    def __init__(
        self, encoder: ConversationEncoder, *, skip_bad_rows: bool, images: ImageSettings | None = None
    ) -> None:
        self._encoder, self._skip_bad_rows, self._images = encoder, skip_bad_rows, images
        self._columns = READ_COLUMNS if images is None else READ_COLUMNS | images.columns

    def encode(self, shard: tuple[Extent, ...], counts: ShardCounts) -> Iterator[tuple[str, bytes, int]]:
        """See `ShardEncoder`."""
        skip = functools.partial(_skip, counts) if self._skip_bad_rows else None
        for extent in shard:
            for place, position, row in read_rows(extent, counts.content, self._columns, skip):
                counts.by_file[extent.path] += 1
                try:
                    found = self._encoder.encode(row, place)
                    line = self._line(found, row, Path(extent.path), position, place)
                except DataError as error:
                    if skip is None:
                        raise
                    skip(error)
                    continue
                if found.num_labels:
                    yield _identity(row), line, len(found.ids)
                else:
                    counts.content[_NO_LABEL] += 1

    def _line(self, found: MaskedTokens, row: dict[str, Any], file: Path, position: int, place: str) -> bytes:
        if self._images is None:
            return encode_masked_line(found.ids, found.loss_mask)
        images = images_of_row(row, found.ids, self._images, file, position, place)
        for image in images:
            image.check()
        loss_mask = [loss and id != self._images.token_id for id, loss in zip(found.ids, found.loss_mask, strict=True)]
        return encode_masked_line(found.ids, loss_mask, [to_json(image, self._images.folder) for image in images])


def _skip(counts: ShardCounts, error: DataError) -> None:
    counts.content[BAD_ROWS] += 1
    if len(counts.bad_rows) < _MAX_MESSAGES:
        counts.bad_rows.append(str(error))


def load_text_encoder(
    tokenizer_path: Path, text: TextOptions, before: list[int], after: list[int], *, trust_remote_code: bool
) -> TextShardEncoder:
    """Load the encoder of texts; see `TextShardEncoder` and `load_tokenizer`."""
    tokenizer = load_tokenizer(tokenizer_path, trust_remote_code=trust_remote_code)
    return TextShardEncoder(tokenizer, text, before, after)


def load_conversation_encoder(
    tokenizer_path: Path,
    template: ChatTemplate | None,
    options: ConversationOptions,
    *,
    skip_bad_rows: bool,
    trust_remote_code: bool,
    images: ImageSettings | None = None,
) -> ConversationShardEncoder:
    """Load the encoder of conversations; see `ConversationShardEncoder` and `load_tokenizer`."""
    tokenizer = load_tokenizer(tokenizer_path, trust_remote_code=trust_remote_code)
    if images is not None:
        tokenizer = PlaceholderTokenizer(tokenizer, images)
    encoder = ConversationEncoder(tokenizer, template, options)
    return ConversationShardEncoder(encoder, skip_bad_rows=skip_bad_rows, images=images)


def _identity(row: dict[str, Any]) -> str:
    """A text that is the same for a row in any file format, whatever other columns it has."""
    known = {name: value for name, value in row.items() if name in READ_COLUMNS and value is not None}
    return json.dumps(known, sort_keys=True, default=str)


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
