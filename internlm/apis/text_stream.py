"""Text as it grows, from tokens that may end in the middle of a character. Knows only a function that decodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What decoders put where bytes are not, or not yet, a character."""


class TextStream:
    """Turns tokens into pieces of text that concatenate to the text of the whole.

    A token is decoded together with those before it, since a decoder may drop a leading space or join bytes; only the
    tokens since the last but one complete character are decoded again, so the work grows with the length of the text.

    Args:
        decode: token ids -> text.
        prompt: tokens whose text has been shown already.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt: Sequence[int] = ()) -> None:
        self._decode = decode
        self._tokens = list(prompt)
        self._context = 0
        self._shown = len(self._tokens)

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is not complete."""
        self._tokens.append(token)
        return self._take(hold_back=True)

    def finish(self) -> str:
        """What was held back, with a replacement character where bytes never became one."""
        return self._take(hold_back=False)

    def _take(self, hold_back: bool) -> str:
        text = self._decode(self._tokens[self._context :])
        if hold_back and text.endswith(INCOMPLETE):
            return ""
        shown = self._decode(self._tokens[self._context : self._shown])
        self._context, self._shown = self._shown, len(self._tokens)
        return text[len(shown) :]
