"""The readable form of a text that grows: whole characters, up to a stop text."""

from __future__ import annotations

from collections.abc import Sequence

from internlm.apis.engine import Text
from internlm.apis.text_stream import StopTexts, TextStream
from internlm.data.tokenize.text_tokenizer import TextTokenizer


class ReadableText:
    """Reads the new tokens of a `Text` as they come.

    Args:
        text: with any number of new tokens.
        tokenizer: of the model.
        stops: texts that end the text; neither they nor what follows is shown. They are not looked for in the text of
            the first `Sampling.min_new_tokens` tokens.

    Attributes:
        shown: what has been returned so far.
    """

    def __init__(self, text: Text, tokenizer: TextTokenizer, stops: Sequence[str] = ()) -> None:
        self.text = text
        self.shown = ""
        self._stream = TextStream(tokenizer.decode, text.prompt.ids)
        self._until = StopTexts(stops)
        self._num_read = 0
        self._is_finished = False

    @property
    def is_stopped(self) -> bool:
        """Whether a stop text has been found."""
        return self._until.found

    @property
    def finish_reason(self) -> str | None:
        """Why the text ended, as `Text.finish_reason`; "stop" at a stop text."""
        return "stop" if self.is_stopped else self.text.finish_reason

    def read(self) -> str:
        """The text that has come since the last call and can be shown now; all of it after the end of the text."""
        pieces = []
        while self._num_read < self.text.num_readable:
            piece = self._stream.push(self.text.new_ids[self._num_read])
            may_end = self._num_read >= self.text.sampling.min_new_tokens
            pieces.append(self._until.push(piece) if may_end else piece)
            self._num_read += 1
        if self.text.finish_reason is not None and not self._is_finished:
            self._is_finished = True
            pieces += [self._until.push(self._stream.finish()), self._until.finish()]
        piece = "".join(pieces)
        self.shown += piece
        return piece
