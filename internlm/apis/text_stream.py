"""Incremental decoding of tokens that may end within a character. Knows only a function that decodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What decoders emit for bytes that are not, or not yet, a character."""


class TextStream:
    """Turns tokens into pieces of text that concatenate to the text of the whole.

    A token is decoded together with those before it, since a decoder may drop a leading space or join bytes; only the
    tokens since the last but one complete character are decoded repeatedly, so the work is linear in its length.

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


class StopTexts:
    """Shows text up to the first of some stop texts. What may be the beginning of one is held back.

    Args:
        stops: texts; none of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False
        """Whether a stop text has come; nothing is shown from then on."""

    def push(self, piece: str) -> str:
        """What can be shown now that this piece has come."""
        if self.found:
            return ""
        self._held += piece
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            return self._take(min(places))
        # The longest end of the text with which a stop text begins.
        keep = max((n for stop in self._stops for n in range(1, len(stop)) if self._held.endswith(stop[:n])), default=0)
        return self._take(len(self._held) - keep)

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        return "" if self.found else self._take(len(self._held))

    def _take(self, length: int) -> str:
        shown, self._held = self._held[:length], self._held[length:]
        return shown
