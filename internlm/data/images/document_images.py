"""The protocol of files of documents with pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from internlm.data.images.image_source import ImageSource


@runtime_checkable
class DocumentsWithImages(Protocol):
    """A `DocumentFile` whose documents may have pictures; such a document is read as a whole.

    Attributes:
        left_out: how many documents are left out and why, a line for the log; None: none.
    """

    @property
    def left_out(self) -> str | None: ...

    def images(self, document: int) -> Sequence[ImageSource]:
        """The pictures of a document, in the order of their placeholders.

        Raises:
            DataError: the document is malformed, or has other placeholders than its pictures need.
        """
