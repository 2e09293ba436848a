"""OpenAI's API: completions and chats, whole or as streams, and the tokens of texts.

What requests may hold is in `requests.py`, the forms of answers are in `answers.py`.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, StreamingResponse

from internlm.apis.engine import Logprob, Text
from internlm.apis.scoring import score_tokens
from internlm.serve.answers import Answer, ChatForm, CompletionForm, Form, Usage
from internlm.serve.pieces import Pieces, compute
from internlm.serve.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    RequestError,
    StreamOptions,
    TokenizeRequest,
)
from internlm.serve.served_model import ServedModel, texts_of
from internlm.utils.errors import DataError

MAX_TEXTS = 1024
"""Texts of a request."""


class OpenAiApi:
    """Answers requests of OpenAI's clients, and those of clients that count tokens.

    Args:
        served: the model.
    """

    def __init__(self, served: ServedModel) -> None:
        self._served = served
        self._engine, self._language, self._settings = served.engine, served.language, served.settings
        self._started = int(time.time())

    async def health(self) -> JSONResponse:
        """Whether texts can be continued."""
        status = 200 if self._engine.is_alive else 503
        return JSONResponse({"status": "ok" if status == 200 else "down", "texts": self._engine.num_texts}, status)

    async def models(self) -> dict[str, Any]:
        """The model."""
        return {"object": "list", "data": [self._card()]}

    async def model(self, name: str) -> dict[str, Any]:
        """The model of that name."""
        self._served.check_model(name)
        return self._card()

    def _card(self) -> dict[str, Any]:
        name, length = self._settings.name, self._engine.max_length
        return {
            "id": name,
            "object": "model",
            "created": self._started,
            "owned_by": "internlm",
            "max_model_len": length,
        }

    async def completions(self, request: Request) -> JSONResponse | StreamingResponse:
        """Continue prompts, or score them with `echo` and `logprobs`."""
        asked = await self._served.read(CompletionRequest, request)
        prompts = [self._served.prompt_ids(prompt) for prompt in _prompts(asked.prompt)]
        num_new = asked.max_tokens if asked.max_tokens is not None else 16
        if num_new == 0 and not asked.echo:
            raise RequestError("max_tokens = 0 asks for nothing; add echo", "max_tokens")
        if asked.n * len(prompts) > MAX_TEXTS:
            raise RequestError(f"n: {asked.n * len(prompts)} texts are more than {MAX_TEXTS} in a request", "n")
        for ids in prompts:
            self._served.check_length(ids, num_new)
        sampling = asked.sampling(self._language, max(num_new, 1), asked.logprobs)
        starts = await self._beginnings(prompts, asked) if asked.echo else [Answer() for _ in prompts]
        starts = [
            replace(start, ids=[*start.ids], logprobs=[*start.logprobs]) for start in starts for _ in range(asked.n)
        ]
        usage = Usage(sum(map(len, prompts)))
        form = CompletionForm(
            self._settings.name,
            self._language.tokenizer,
            asked.logprobs is not None,
            len(prompts) * asked.n,
        )
        texts = texts_of(prompts, asked.n, sampling) if num_new else []
        if not texts:
            for start in starts:
                start.finish_reason = "length"
        return await self._answer(request, form, texts, asked.stops, starts, usage, asked.stream, asked.stream_options)

    async def _beginnings(self, prompts: list[list[int]], asked: CompletionRequest) -> list[Answer]:
        """The prompts as beginnings of their answers, with log-probabilities if they are asked for."""
        found = []
        for ids in prompts:
            answer = Answer(self._language.tokenizer.decode(ids))
            if asked.logprobs is not None:
                score = partial(
                    score_tokens,
                    self._language.model,
                    ids,
                    asked.logprobs,
                    self._language.tokenizer.vocab_size,
                )
                scores: list[Logprob] = await compute(self._engine, score)
                answer.ids, answer.logprobs = list(ids), [None, *scores]
            found.append(answer)
        return found

    async def chat_completions(self, request: Request) -> JSONResponse | StreamingResponse:
        """Answer a conversation."""
        asked = await self._served.read(ChatRequest, request)
        template = self._settings.template
        if template is None:
            raise RequestError(
                "this model has no chat template, as base models have none: use /v1/completions, or start the server "
                "with --chat-template"
            )
        try:
            ids = self._language.encode_chat(template, asked.chat())
        except DataError as error:
            raise RequestError(f"messages: {error}", "messages") from None
        if asked.max_tokens is not None and asked.max_completion_tokens is not None:
            raise RequestError("give max_completion_tokens or max_tokens, not both", "max_tokens")
        given = asked.max_completion_tokens or asked.max_tokens
        num_new = given if given is not None else self._engine.max_length - len(ids)
        self._served.check_length(ids, max(num_new, 1))
        if asked.top_logprobs is not None and not asked.logprobs:
            raise RequestError("top_logprobs needs logprobs = true", "top_logprobs")
        top = (asked.top_logprobs or 0) if asked.logprobs else None
        sampling = asked.sampling(self._language, num_new, top)
        form = ChatForm(self._settings.name, self._language.tokenizer, asked.logprobs, asked.stream)
        texts = texts_of([ids], asked.n, sampling)
        starts = [Answer() for _ in texts]
        usage = Usage(len(ids))
        return await self._answer(request, form, texts, asked.stops, starts, usage, asked.stream, asked.stream_options)

    async def _answer(
        self,
        request: Request,
        form: Form,
        texts: list[Text],
        stops: Sequence[str],
        answers: list[Answer],
        usage: Usage,
        is_stream: bool,
        stream_options: StreamOptions | None,
    ) -> JSONResponse | StreamingResponse:
        """Continue texts, and send them whole or as they come; `answers` has what is in front of each."""
        if stream_options is not None and not is_stream:
            raise RequestError("stream_options needs stream = true", "stream_options")
        pieces = Pieces(
            self._engine,
            texts,
            stops,
            seconds=self._settings.seconds,
            # A stream is cancelled by the framework.
            is_disconnected=None if is_stream else request.is_disconnected,
        )
        if is_stream:
            has_usage = stream_options is not None and stream_options.include_usage
            events = _events(form, pieces, answers, usage, has_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        async for piece in pieces:
            answers[piece.index].add(piece)
            if piece.finish_reason is not None:
                usage.completion_tokens += piece.num_tokens
        return JSONResponse(form.whole(answers, usage))

    async def tokenize(self, request: Request) -> dict[str, Any]:
        """The tokens of a text."""
        asked = await self._served.read(TokenizeRequest, request)
        with_bos = self._settings.with_bos and asked.add_special_tokens
        ids = self._language.tokenizer.encode_batch([asked.prompt])[0]
        if with_bos and self._language.tokenizer.bos_id is not None:
            ids = [self._language.tokenizer.bos_id, *ids]
        return {"tokens": ids, "count": len(ids), "max_model_len": self._engine.max_length}

    async def detokenize(self, request: Request) -> dict[str, str]:
        """The text of tokens."""
        asked = await self._served.read(DetokenizeRequest, request)
        self._served.check_ids(asked.tokens, "tokens")
        return {"prompt": self._language.tokenizer.decode(asked.tokens)}

    async def tokenizer_info(self) -> dict[str, Any]:
        """What clients that count tokens need to know."""
        tokenizer, template = self._language.tokenizer, self._settings.template

        def spelled(id: int | None) -> str | None:
            return None if id is None else tokenizer.decode([id])

        return {
            "vocab_size": tokenizer.vocab_size,
            "bos_token": spelled(tokenizer.bos_id),
            "eos_token": spelled(tokenizer.eos_id),
            "eos_token_ids": list(self._language.eos_ids),
            "chat_template": None if template is None else template.source,
        }


def _prompts(given: str | list[str] | list[int] | list[list[int]]) -> Sequence[str | list[int]]:
    if isinstance(given, str):
        return [given]
    if not given:
        raise RequestError("prompt: must not be empty", "prompt")
    if isinstance(given[0], int):
        return [given]
    return given


async def _events(
    form: Form, pieces: Pieces, beginnings: list[Answer], usage: Usage, has_usage: bool
) -> AsyncIterator[str]:
    """The events of a stream (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""
    for index, answer in enumerate(beginnings):
        first = form.beginning(index)
        if first is not None:
            yield _event(first)
        if answer.text or answer.finish_reason is not None:
            yield _event(form.chunk(index, answer))
    try:
        async for piece in pieces:
            if piece.finish_reason is not None:
                usage.completion_tokens += piece.num_tokens
            if piece.text or piece.ids or piece.finish_reason is not None:
                part = Answer()
                part.add(piece)
                yield _event(form.chunk(piece.index, part))
    except RequestError as error:
        yield _event(error.body())
        return
    if has_usage:
        yield _event(form.end(usage))
    yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
