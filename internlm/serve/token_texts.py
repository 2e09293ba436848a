"""What single tokens of a text say: their bytes, which may be parts of a character, and a spelling for each."""

from __future__ import annotations

import codecs
import re

from internlm.data.tokenize.text_tokenizer import TextTokenizer

_PART = "\N{REPLACEMENT CHARACTER}"
_BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")


class TokenTexts:
    """Reads tokens one by one, as they are within a text: with the space in front of a word.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._before = tokenizer.encode_batch(["a"])[0]
        self._text_before = tokenizer.decode(self._before)
        self._pieces = tokenizer.pieces()
        self._bytes: dict[int, bytes] = {}

    def bytes_of(self, id: int) -> bytes:
        """The UTF-8 of a token."""
        if id not in self._bytes:
            self._bytes[id] = self._find_bytes(id)
        return self._bytes[id]

    def text_of(self, id: int) -> str:
        """The text of a token, with replacement characters for parts of a character."""
        return self.bytes_of(id).decode(errors="replace")

    def spelling(self, id: int) -> str:
        r"""The text of a token; "bytes:\xf0\x9f" for parts of a character, as in OpenAI's completions."""
        try:
            return self.bytes_of(id).decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(chr(n) if 0x20 <= n < 0x7F else rf"\x{n:02x}" for n in self.bytes_of(id))

    def _find_bytes(self, id: int) -> bytes:
        text = self._tokenizer.decode([*self._before, id])
        # Decoders drop the space at the beginning of a text.
        is_behind = text.startswith(self._text_before)
        text = text.removeprefix(self._text_before) if is_behind else self._tokenizer.decode([id])
        raw = _raw_bytes(self._pieces[id]) if _PART in text else None
        return text.encode() if raw is None else raw


class TokenOffsets:
    """Where the tokens of one text begin in it, in characters; tokens of one character begin where it does.

    Args:
        texts: of the tokens.
    """

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_characters = 0
        self._is_first = True

    def take(self, ids: list[int], text: str) -> list[int]:
        """The beginnings of the next tokens, whose text begins with `text` as far as it is known."""
        offsets = []
        for id in ids:
            offsets.append(self._num_characters)
            own = self._texts.bytes_of(id)
            if self._is_first and text and not text.startswith(" "):
                own = own.removeprefix(b" ")
            self._is_first = False
            self._num_characters += len(self._decoder.decode(own))
        return offsets


def _raw_bytes(piece: str) -> bytes | None:
    """The bytes that a vocabulary spells by one of the two usual ways; None for other pieces."""
    match = _BYTE_PIECE.fullmatch(piece)
    if match is not None:
        return bytes.fromhex(match[1])
    return bytes(_BYTE_OF[letter] for letter in piece) if _BYTE_OF.keys() >= {*piece} else None


def _byte_letters() -> dict[str, int]:
    """Letter -> byte, of GPT-2's vocabulary: printable Latin-1 stands for itself, the rest follows from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_letters()
