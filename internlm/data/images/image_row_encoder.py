"""Adds the pictures of rows to rows that are encoded as documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from internlm.data.images.row_images import images_of_row
from internlm.data.images.settings import ImageSettings
from internlm.data.rows.row_file import RowFile
from internlm.data.sources.row_encoder import EncodedRow, RowEncoder
from internlm.utils.errors import DataError, RemoteDataError


class ImageRowEncoder:
    """A `RowEncoder` of rows with pictures, and of rows of text among them.

    Args:
        encoder: of their text, with a `PlaceholderTokenizer`.
        settings: of the pictures.
    """

    def __init__(self, encoder: RowEncoder, settings: ImageSettings) -> None:
        self._encoder, self._settings = encoder, settings

    def encode(self, rows: Sequence[tuple[RowFile, int]]) -> list[EncodedRow]:
        """See `RowEncoder`."""
        encoded = self._encoder.encode(rows)
        return [self._with_images(each, file, row) for each, (file, row) in zip(encoded, rows, strict=True)]

    def _with_images(self, encoded: EncodedRow, file: RowFile, row: int) -> EncodedRow:
        if encoded.error is not None or encoded.left_out is not None:
            return encoded
        document = f"{file.path}: row {row}"
        settings = self._settings
        try:
            images = images_of_row(file.read(row), encoded.ids, settings, file.path, row, document)
        except RemoteDataError:
            raise
        except DataError as error:
            return replace(encoded, error=error)
        return replace(
            encoded,
            loss_mask=encoded.loss_mask & (encoded.ids != settings.token_id),
            images=tuple(images),
            left_out=settings.too_long(len(encoded.ids)) if images else None,
        )
