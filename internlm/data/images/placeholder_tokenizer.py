"""A tokenizer that turns `<image>` into the placeholders of a picture."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from internlm.data.images.settings import IMAGE_MARKER, ImageSettings
from internlm.data.tokenize.text_tokenizer import TextTokenizer
from internlm.data.tokenize.token_bytes import TokenBytes
from internlm.utils.errors import ConfigError


class PlaceholderTokenizer:
    """A `TextTokenizer` whose ids have the P placeholders of a picture in place of each `<image>`.

    If `<image>` is the token `settings.token_id` of the tokenizer, texts are encoded with it, as transformers does.
    Otherwise the texts around it are encoded separately (as in LLaVA, Liu et al. 2023).

    Args:
        tokenizer: of the text.
        settings: of the placeholders.

    Raises:
        ConfigError: the placeholder is a token of ordinary text, which would be taken for a part of a picture.
    """

    def __init__(self, tokenizer: TextTokenizer, settings: ImageSettings) -> None:
        self._tokenizer, self._settings = tokenizer, settings
        self.vocab_size, self.special_ids = tokenizer.vocab_size, tokenizer.special_ids
        self.bos_id, self.eos_id = tokenizer.bos_id, tokenizer.eos_id
        is_known = settings.token_id < tokenizer.vocab_size
        piece = tokenizer.pieces()[settings.token_id] if is_known else ""
        if piece and settings.token_id not in tokenizer.special_ids:
            raise ConfigError(
                f"the placeholder of pictures, {settings.token_id}, is the token {piece!r} of ordinary text; set "
                "model.image_token_id (--image-token-id) to a special token, or to an id behind the vocabulary, as "
                f"{tokenizer.vocab_size}"
            )
        [alone] = tokenizer.encode_batch([IMAGE_MARKER])
        self._knows_marker = alone == [settings.token_id]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """See `TextTokenizer`."""
        placeholders = [self._settings.token_id] * self._settings.tokens_per_image
        if self._knows_marker:
            return [
                [each for id in ids for each in (placeholders if id == self._settings.token_id else (id,))]
                for ids in self._tokenizer.encode_batch(texts)
            ]
        parts = [text.split(IMAGE_MARKER) for text in texts]
        # Some tokenizers encode an empty text as a token.
        encoded = iter(self._tokenizer.encode_batch([part for each in parts for part in each if part]))
        return [self._joined(each, encoded, placeholders) for each in parts]

    @staticmethod
    def _joined(parts: list[str], encoded: Iterator[list[int]], placeholders: list[int]) -> list[int]:
        ids: list[int] = []
        for number, part in enumerate(parts):
            ids += placeholders if number else []
            ids += next(encoded) if part else []
        return ids

    def decode(self, ids: list[int]) -> str:
        """See `TextTokenizer`; `<image>` for P placeholders, also for the incomplete ones of a picture."""
        text = ""
        for is_image, run in groupby(ids, lambda id: id == self._settings.token_id):
            part = list(run)
            num_images = -(-len(part) // self._settings.tokens_per_image)
            text += IMAGE_MARKER * num_images if is_image else self._tokenizer.decode(part)
        return text

    def pieces(self) -> list[str]:
        """See `TextTokenizer`."""
        return self._tokenizer.pieces()

    def token_bytes(self) -> TokenBytes:
        """See `TextTokenizer`."""
        return self._tokenizer.token_bytes()
