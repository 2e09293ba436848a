"""The answers of the server, in the forms of OpenAI's API."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from internlm.apis.engine import Logprob
from internlm.serve.engine_thread import Piece
from internlm.serve.requests import finite
from internlm.serve.token_texts import TokenOffsets, TokenTexts


@dataclass
class Usage:
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int = 0

    def body(self) -> dict[str, int]:
        """As part of an answer."""
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }


@dataclass
class Answer:
    """What a text of a request has become so far."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    logprobs: list[Logprob | None] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, piece: Piece) -> None:
        """Append a piece."""
        self.text += piece.text
        self.ids += piece.ids
        self.logprobs += piece.logprobs
        self.finish_reason = piece.finish_reason


class Form(Protocol):
    """The form of an endpoint's answers."""

    def whole(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        """The answer with all texts."""

    def beginning(self, index: int) -> dict[str, Any] | None:
        """What a stream says before the text `index`."""

    def chunk(self, index: int, part: Answer) -> dict[str, Any]:
        """A part of the text `index` in a stream."""

    def end(self, usage: Usage) -> dict[str, Any]:
        """The usage at the end of a stream."""


class _Envelope:
    def __init__(self, kind: str, model: str, prefix: str) -> None:
        self._common = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }

    def _with(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {**self._common, "choices": choices, **more}

    def end(self, usage: Usage) -> dict[str, Any]:
        """See `Form`."""
        return self._with([], usage=usage.body())


class CompletionForm(_Envelope):
    """`/v1/completions`.

    Args:
        model: its name.
        tokens: of the model.
        has_logprobs: whether they are asked for.
        num_texts: of the request.
    """

    def __init__(self, model: str, tokens: TokenTexts, has_logprobs: bool, num_texts: int) -> None:
        super().__init__("text_completion", model, "cmpl")
        self._tokens = tokens
        self._has_logprobs = has_logprobs
        self._offsets = [TokenOffsets(tokens) for _ in range(num_texts)]

    def whole(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        """See `Form`."""
        return self._with([self._choice(index, each) for index, each in enumerate(answers)], usage=usage.body())

    def beginning(self, index: int) -> dict[str, Any] | None:
        """See `Form`."""
        return None

    def chunk(self, index: int, part: Answer) -> dict[str, Any]:
        """See `Form`."""
        return self._with([self._choice(index, part)])

    def _choice(self, index: int, part: Answer) -> dict[str, Any]:
        logprobs = self._logprobs(index, part) if self._has_logprobs else None
        return {"index": index, "text": part.text, "logprobs": logprobs, "finish_reason": part.finish_reason}

    def _logprobs(self, index: int, part: Answer) -> dict[str, Any]:
        tokens = [self._tokens.spelling(id) for id in part.ids]
        offsets = self._offsets[index].take(part.ids, part.text)
        tops: list[dict[str, float] | None] = []
        for each in part.logprobs:
            top: dict[str, float] = {}
            for id, value in () if each is None else each.top:
                # A vocabulary may have several tokens for the same character; the likeliest comes first.
                top.setdefault(self._tokens.spelling(id), finite(value))
            tops.append(None if each is None else top)
        values = [None if each is None else finite(each.value) for each in part.logprobs]
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


class ChatForm(_Envelope):
    """`/v1/chat/completions`.

    Args:
        model: its name.
        tokens: of the model.
        has_logprobs: whether they are asked for.
        is_stream: whether the answer comes in chunks.
    """

    def __init__(self, model: str, tokens: TokenTexts, has_logprobs: bool, is_stream: bool) -> None:
        super().__init__("chat.completion.chunk" if is_stream else "chat.completion", model, "chatcmpl")
        self._tokens = tokens
        self._has_logprobs = has_logprobs

    def whole(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        """See `Form`."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": each.text},
                "logprobs": self._logprobs(each),
                "finish_reason": each.finish_reason,
            }
            for index, each in enumerate(answers)
        ]
        return self._with(choices, usage=usage.body())

    def beginning(self, index: int) -> dict[str, Any] | None:
        """See `Form`."""
        delta = {"role": "assistant", "content": ""}
        return self._with([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def chunk(self, index: int, part: Answer) -> dict[str, Any]:
        """See `Form`."""
        delta = {"content": part.text} if part.text or part.ids else {}
        choice = {"index": index, "delta": delta, "logprobs": self._logprobs(part), "finish_reason": part.finish_reason}
        return self._with([choice])

    def _logprobs(self, part: Answer) -> dict[str, Any] | None:
        if not self._has_logprobs:
            return None
        content = [
            {**self._token(id, each.value), "top_logprobs": [self._token(*top) for top in each.top]}
            for id, each in zip(part.ids, part.logprobs, strict=True)
            if each is not None
        ]
        return {"content": content}

    def _token(self, id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._tokens.text_of(id),
            "logprob": finite(logprob),
            "bytes": list(self._tokens.bytes_of(id)),
        }
