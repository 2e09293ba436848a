"""Runs a generation engine in a thread of its own, for callers on other threads."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from internlm.apis.engine import GenerationEngine, Logprob, Text
from internlm.apis.generation import DEFAULT_ROWS
from internlm.serve.language_model import LanguageModel
from internlm.serve.readable_text import ReadableText
from internlm.utils.logging import get_logger

logger = get_logger(__name__)

Result = TypeVar("Result")


class BusyError(Exception):
    """Too many texts wait already."""


@dataclass(frozen=True)
class Piece:
    """What a step of the engine added to a text.

    Attributes:
        index: of the text in its request.
        text: characters that can be shown.
        ids: new tokens, without one that ends the text.
        logprobs: of these tokens; empty unless they are asked for.
        finish_reason: "stop", "length", "cancelled" or "failed" at the end of the text.
        num_tokens: new tokens of the text so far, with one that ends it.
    """

    index: int
    text: str
    ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...]
    finish_reason: str | None
    num_tokens: int


@dataclass
class _Reader:
    index: int
    readable: ReadableText
    show: Callable[[Piece], None]
    num_seen: int = 0

    def piece(self) -> Piece:
        text = self.readable.text
        shown = self.readable.read()
        stop = text.num_readable
        ids = tuple(text.new_ids[self.num_seen : stop])
        logprobs = tuple(text.logprobs[self.num_seen : stop])
        self.num_seen = stop
        return Piece(self.index, shown, ids, logprobs, self.readable.finish_reason, len(text.new_ids))


class EngineThread:
    """Continues texts of a language model, and computes what else needs it, one after the other.

    Args:
        language: the model; nothing else may use it.
        max_length: tokens of a prompt and its continuation together.
        num_rows: texts at a time.
        max_waiting: texts that may wait for a row.

    Attributes:
        num_texts: texts that wait or grow.
    """

    def __init__(
        self, language: LanguageModel, *, max_length: int, num_rows: int = DEFAULT_ROWS, max_waiting: int = 64
    ) -> None:
        self.language = language
        self.max_length = max_length
        self._limit = num_rows + max_waiting
        self._engine = GenerationEngine(language.model, num_rows=num_rows, max_length=max_length)
        self._readers: dict[int, _Reader] = {}
        self._calls: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self.num_texts = 0
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread still works."""
        return self._thread.is_alive()

    def submit(self, texts: Sequence[Text], stops: Sequence[str], show: Callable[[Piece], None]) -> None:
        """Continue texts.

        Args:
            texts: with settings that the caller has checked, and that fit into `max_length`.
            stops: texts that end each of them.
            show: called in the engine's thread with each piece, the last one with a finish reason.

        Raises:
            BusyError: too many texts wait.
        """
        with self._changed:
            if self.num_texts + len(texts) > self._limit:
                raise BusyError
            self.num_texts += len(texts)
        readers = [
            _Reader(index, ReadableText(text, self.language.tokenizer, stops), show) for index, text in enumerate(texts)
        ]

        def start() -> None:
            for text, reader in zip(texts, readers, strict=True):
                self._readers[id(text)] = reader
                try:
                    self._engine.submit(text)
                except Exception:
                    self._fail(text)

        self._call(start)

    def cancel(self, texts: Sequence[Text]) -> None:
        """End texts whose continuation nobody reads; those that have ended are left."""

        def stop() -> None:
            for text in texts:
                self._engine.cancel(text)
                self._forget(text)

        self._call(stop)

    def compute(self, function: Callable[[], Result], show: Callable[[Result | Exception], None]) -> None:
        """Call a function that uses the model between two steps, and pass its result, or what it raises, to `show`."""

        def call() -> None:
            try:
                result: Result | Exception = function()
            except Exception as error:
                result = error
            show(result)

        self._call(call)

    def close(self) -> None:
        """End the thread after the step that it is in."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _call(self, function: Callable[[], None]) -> None:
        with self._changed:
            self._calls.append(function)
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._calls or self._is_closed or not self._engine.is_idle)
                if self._is_closed:
                    return
                calls = list(self._calls)
                self._calls.clear()
            for call in calls:
                call()
            try:
                for text in self._engine.step():
                    self._show(text)
            except Exception:
                for reader in list(self._readers.values()):
                    self._fail(reader.readable.text)

    def _fail(self, text: Text) -> None:
        """End a text after a defect, or without memory: whoever waits must not wait for ever."""
        logger.exception("a text failed")
        self._engine.cancel(text)
        text.finish_reason = "failed"
        self._show(text)

    def _show(self, text: Text) -> None:
        reader = self._readers.get(id(text))
        if reader is None:
            return
        piece = reader.piece()
        if piece.finish_reason is not None:
            self._engine.cancel(text)
            self._forget(text)
        reader.show(piece)

    def _forget(self, text: Text) -> None:
        if self._readers.pop(id(text), None) is not None:
            with self._changed:
                self.num_texts -= 1
