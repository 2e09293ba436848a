"""The record of the tokenizer whose ids a checkpoint was trained on: a file in the checkpoint."""

from __future__ import annotations

import json
from typing import NamedTuple

from internlm.utils.errors import CheckpointError
from internlm.utils.storage import StoragePath

DATA_TOKENIZER = "data_tokenizer.json"


class KnownTokenizer(NamedTuple):
    """A tokenizer, identified without its files."""

    fingerprint: str
    """See `tokenizer_fingerprint`."""
    where: str
    """File or folder of the tokenizer, for messages."""
    vocab_size: int

    def to_json(self) -> str:
        """Content of the file."""
        return json.dumps(self._asdict(), indent=1)

    @classmethod
    def from_json(cls, content: str) -> KnownTokenizer:
        """Inverse of `to_json`.

        Raises:
            ValueError, TypeError: the content is malformed.
        """
        return cls(**json.loads(content))

    def against(self, other: KnownTokenizer) -> str:
        """Both tokenizers, described for a message."""
        one, two = (f"{it.where} ({it.vocab_size:,} ids, fingerprint {it.fingerprint})" for it in (self, other))
        return f"{one} against {two}"


def trained_with(checkpoint: StoragePath) -> KnownTokenizer | None:
    """The tokenizer of a checkpoint's training data; None if it was not recorded.

    Raises:
        CheckpointError: the file is malformed.
    """
    path = checkpoint / DATA_TOKENIZER
    if not path.is_file():
        return None
    try:
        return KnownTokenizer.from_json(path.read_text())
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"'{path}' is malformed: {error}") from error
