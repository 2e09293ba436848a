"""Encodes rows as documents of token ids while a run trains: the text of a column, or conversations."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from internlm.data.conversations.encoder import ConversationEncoder
from internlm.data.images.image_source import ImageCell, ImageFile
from internlm.data.rows.row_file import RowFile, read_text
from internlm.data.tokenize.text_tokenizer import TextTokenizer
from internlm.utils.errors import DataError, RemoteDataError


@dataclass(frozen=True)
class EncodedRow:
    """A row as a document.

    Attributes:
        ids: int64 [n].
        loss_mask: bool [n].
        left_out: why a readable row is no document, such as one without a token; None: it is one.
        error: why the row cannot be read; raised when its sample is needed.
        images: its pictures, in the order of their placeholders.
    """

    ids: NDArray[np.int64]
    loss_mask: NDArray[np.bool_]
    left_out: str | None = None
    error: DataError | None = None
    images: tuple[ImageFile | ImageCell, ...] = ()


class RowEncoder(Protocol):
    """Encodes rows. Sent to worker processes."""

    def encode(self, rows: Sequence[tuple[RowFile, int]]) -> list[EncodedRow]:
        """Encode each row, given as (file, row number)."""


class TextRowEncoder:
    """Encodes the text of a column.

    Args:
        tokenizer: the tokenizer.
        column: the name of the column.
        before, after: ids to put before and after every document.
    """

    def __init__(self, tokenizer: TextTokenizer, column: str, before: list[int], after: list[int]) -> None:
        self._tokenizer, self._column, self._before, self._after = tokenizer, column, before, after

    def encode(self, rows: Sequence[tuple[RowFile, int]]) -> list[EncodedRow]:
        """See `RowEncoder`."""
        # Processes provide the parallelism; threads of the library would compete with them.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        texts: list[str] = []
        errors: dict[int, DataError] = {}
        for number, (file, row) in enumerate(rows):
            try:
                texts.append(read_text(file, row, self._column))
            except RemoteDataError:
                raise
            except DataError as error:
                errors[number] = error
                texts.append("")
        found = []
        for number, ids in enumerate(self._tokenizer.encode_batch(texts)):
            if number in errors:
                found.append(_without_tokens(error=errors[number]))
            elif not ids:
                found.append(_without_tokens(left_out="it has no token"))
            else:
                document = np.array(self._before + ids + self._after, dtype=np.int64)
                found.append(EncodedRow(document, np.ones(len(document), dtype=np.bool_)))
        return found


class ConversationRowEncoder:
    """Encodes conversations, of which the answers have loss.

    Args:
        encoder: encodes one row.
    """

    def __init__(self, encoder: ConversationEncoder) -> None:
        self._encoder = encoder

    def encode(self, rows: Sequence[tuple[RowFile, int]]) -> list[EncodedRow]:
        """See `RowEncoder`."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        return [self._encode(file, row) for file, row in rows]

    def _encode(self, file: RowFile, row: int) -> EncodedRow:
        try:
            found = self._encoder.encode(file.read(row), f"{file.path}: row {row}")
        except RemoteDataError:
            raise
        except DataError as error:
            return _without_tokens(error=error)
        if not found.num_labels:
            return _without_tokens(left_out="it has no answer to learn from")
        return EncodedRow(np.array(found.ids, dtype=np.int64), np.array(found.loss_mask, dtype=np.bool_))


def _without_tokens(left_out: str | None = None, error: DataError | None = None) -> EncodedRow:
    return EncodedRow(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.bool_), left_out, error)
