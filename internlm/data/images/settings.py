"""What tokens of pictures look like, and where pictures are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internlm.utils.errors import DataError

IMAGE_MARKER = "<image>"
"""Where a text has a picture."""

IMAGE_COLUMNS = ("image", "images")
"""Columns of rows with pictures where none is named."""


@dataclass(frozen=True)
class ImageSettings:
    """Facts about pictures that packing and tokenization need; nothing about pixels.

    Attributes:
        token_id: id of a placeholder, which may be outside the vocabulary.
        tokens_per_image: P, the placeholders of a picture.
        seq_len: tokens of the longest document with pictures; longer ones are left out.
        folder: that paths of pictures are relative to.
        column: of rows, with the pictures; None: `image` or `images`.
    """

    token_id: int
    tokens_per_image: int
    seq_len: int
    folder: Path | None = None
    column: str | None = None

    @property
    def columns(self) -> frozenset[str]:
        """Columns of rows that may have pictures."""
        return frozenset(IMAGE_COLUMNS if self.column is None else (self.column,))

    @property
    def facts(self) -> dict[str, Any]:
        """What the order and the ids of samples depend on, as JSON values."""
        return {"image_token_id": self.token_id, "tokens_per_image": self.tokens_per_image, "image_column": self.column}

    def too_long(self, num_tokens: int) -> str | None:
        """Why a document with pictures is left out; None: it is not."""
        if num_tokens <= self.seq_len:
            return None
        return (
            f"it has pictures and {num_tokens:,} tokens, of which {self.tokens_per_image:,} for each picture, and "
            f"data.seq_len is {self.seq_len:,}: documents with pictures are not cut"
        )

    def check_count(self, ids: NDArray[np.int64], num_images: int, document: str, markers: str) -> None:
        """Check that a document has the placeholders of its pictures, each picture in one piece.

        Args:
            ids: int64 [n], of the whole document.
            num_images: pictures of the document.
            document: file and position, for messages.
            markers: what a user calls the placeholders of one picture in this kind of file, in the plural.

        Raises:
            DataError: it has not.
        """
        is_placeholder = np.concatenate(([False], ids == self.token_id, [False]))
        borders = np.flatnonzero(is_placeholder[1:] != is_placeholder[:-1])
        runs = borders[1::2] - borders[::2]
        if (runs % self.tokens_per_image).any():
            length = int(runs[np.flatnonzero(runs % self.tokens_per_image)[0]])
            raise DataError(
                f"{document} has {length:,} placeholders (token {self.token_id}) in sequence, and a picture has "
                f"{self.tokens_per_image:,}: it was tokenized for another image_size, patch_size or tower; tokenize it "
                "again"
            )
        num_places = int(runs.sum()) // self.tokens_per_image
        if num_places != num_images:
            raise DataError(
                f"{document} has {num_places} {markers}, and {num_images} pictures: give each picture its place in the "
                "text, or remove the document"
            )
