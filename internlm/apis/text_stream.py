"""Incremental decoding of tokens, which may end within a character. Needs only a decoding function."""

from __future__ import annotations

from collections.abc import Callable, Sequence

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What decoders emit for bytes that are no complete character."""


class TextStream:
    """Turns tokens into pieces of text whose concatenation is the text of all tokens.

    A token is decoded together with its predecessors, since a decoder may drop a leading space or join bytes. Only the
    tokens since the last complete character but one are decoded repeatedly, so the work is linear in the length.

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
        """Return the text that this token completes; empty while a character is incomplete."""
        self._tokens.append(token)
        return self._take(hold_back=True)

    def finish(self) -> str:
        """Return the pending text, with a replacement character for incomplete characters."""
        return self._take(hold_back=False)

    def _take(self, hold_back: bool) -> str:
        text = self._decode(self._tokens[self._context :])
        if hold_back and text.endswith(INCOMPLETE):
            return ""
        shown = self._decode(self._tokens[self._context : self._shown])
        self._context, self._shown = self._shown, len(self._tokens)
        return text[len(shown) :]


class StopTexts:
    """Passes text through up to the first stop text, and withholds what may be the beginning of one.

    Args:
        stops: texts; none of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._pending = ""
        self.found = False
        """Whether a stop text has been found; nothing is returned from then on."""

    def push(self, piece: str) -> str:
        """Add a piece and return the text that can be shown now."""
        if self.found:
            return ""
        self._pending += piece
        positions = [position for stop in self._stops if (position := self._pending.find(stop)) >= 0]
        if positions:
            self.found = True
            return self._take(min(positions))
        # The longest suffix of the text that is a prefix of a stop text.
        sizes = (n for stop in self._stops for n in range(1, len(stop)) if self._pending.endswith(stop[:n]))
        return self._take(len(self._pending) - max(sizes, default=0))

    def finish(self) -> str:
        """Return the pending text, at the end of the input."""
        return "" if self.found else self._take(len(self._pending))

    def _take(self, length: int) -> str:
        shown, self._pending = self._pending[:length], self._pending[length:]
        return shown
