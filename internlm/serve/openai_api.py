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
from internlm.eval.endings import with_first
from internlm.serve.answers import Answer, ChatForm, CompletionForm, Form, Usage
from internlm.serve.pieces import Pieces, compute
from internlm.serve.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    RequestError,
    TokenizeRequest,
)
from internlm.serve.served_model import ServedModel, ServedModels, texts_of
from internlm.utils.errors import DataError

MAX_TEXTS = 1024
"""Texts of a request."""


class OpenAiApi:
    """Answers requests of OpenAI's clients, and those of clients that count tokens.

    Args:
        models: of the server.
    """

    def __init__(self, models: ServedModels) -> None:
        self._models = models
        self._started = int(time.time())

    async def health(self) -> JSONResponse:
        """Whether texts can be continued."""
        is_alive = all(model.engine.is_alive for model in self._models)
        num_texts = sum(model.engine.num_texts for model in self._models)
        return JSONResponse({"status": "ok" if is_alive else "down", "texts": num_texts}, 200 if is_alive else 503)

    async def models(self) -> dict[str, Any]:
        """All models."""
        return {"object": "list", "data": self.cards()}

    def cards(self) -> list[dict[str, Any]]:
        """What is said about each model; `has_chat_template` is for the page."""
        return [self._card(model) for model in self._models]

    async def model(self, name: str) -> dict[str, Any]:
        """The model of that name."""
        return self._card(self._models.find(name))

    def _card(self, model: ServedModel) -> dict[str, Any]:
        return {
            "id": model.name,
            "object": "model",
            "created": self._started,
            "owned_by": "internlm",
            "max_model_len": model.engine.max_length,
            "has_chat_template": model.template is not None,
        }

    async def completions(self, request: Request) -> JSONResponse | StreamingResponse:
        """Continue prompts, or score them with `echo` and `logprobs`."""
        served, asked = await self._models.read(CompletionRequest, request)
        prompts = [served.prompt_ids(prompt) for prompt in _prompts(asked.prompt)]
        num_new = asked.max_tokens if asked.max_tokens is not None else 16
        if num_new == 0 and not asked.echo:
            raise RequestError("max_tokens = 0 asks for nothing; add echo", "max_tokens")
        if asked.n * len(prompts) > MAX_TEXTS:
            raise RequestError(f"n: {asked.n * len(prompts)} texts are more than {MAX_TEXTS} in a request", "n")
        for ids in prompts:
            served.check_length(ids, num_new)
        sampling = asked.sampling(served.language, max(num_new, 1), asked.logprobs)
        starts = await _beginnings(served, prompts, asked) if asked.echo else [Answer() for _ in prompts]
        starts = [
            replace(start, ids=[*start.ids], logprobs=[*start.logprobs]) for start in starts for _ in range(asked.n)
        ]
        usage = Usage(sum(map(len, prompts)))
        form = CompletionForm(
            served.name,
            served.tokens,
            asked.logprobs is not None,
            len(prompts) * asked.n,
        )
        texts = texts_of(prompts, asked.n, sampling) if num_new else []
        if not texts:
            for start in starts:
                start.finish_reason = "length"
        return await self._answer(served, request, asked, form, texts, starts, usage)

    async def chat_completions(self, request: Request) -> JSONResponse | StreamingResponse:
        """Answer a conversation."""
        served, asked = await self._models.read(ChatRequest, request)
        template = served.template
        if template is None:
            raise RequestError(
                "this model has no chat template, as base models have none: use /v1/completions, or start the server "
                "with --chat-template"
            )
        try:
            ids = served.language.encode_chat(template, asked.chat())
        except DataError as error:
            raise RequestError(f"messages: {error}", "messages") from None
        if asked.max_tokens is not None and asked.max_completion_tokens is not None:
            raise RequestError("give max_completion_tokens or max_tokens, not both", "max_tokens")
        given = asked.max_completion_tokens or asked.max_tokens
        num_new = given if given is not None else served.engine.max_length - len(ids)
        served.check_length(ids, max(num_new, 1))
        if asked.top_logprobs is not None and not asked.logprobs:
            raise RequestError("top_logprobs needs logprobs = true", "top_logprobs")
        top = (asked.top_logprobs or 0) if asked.logprobs else None
        sampling = asked.sampling(served.language, num_new, top)
        form = ChatForm(served.name, served.tokens, asked.logprobs, asked.stream)
        texts = texts_of([ids], asked.n, sampling)
        starts = [Answer() for _ in texts]
        usage = Usage(len(ids))
        return await self._answer(served, request, asked, form, texts, starts, usage)

    async def _answer(
        self,
        served: ServedModel,
        request: Request,
        asked: CompletionRequest | ChatRequest,
        form: Form,
        texts: list[Text],
        answers: list[Answer],
        usage: Usage,
    ) -> JSONResponse | StreamingResponse:
        """Continue texts, and send them whole or as they come; `answers` has what is in front of each."""
        if asked.stream_options is not None and not asked.stream:
            raise RequestError("stream_options needs stream = true", "stream_options")
        pieces = Pieces(
            served.engine,
            texts,
            asked.stops,
            seconds=self._models.settings.seconds,
            # A stream is cancelled by the framework.
            is_disconnected=None if asked.stream else request.is_disconnected,
        )
        if asked.stream:
            has_usage = asked.stream_options is not None and asked.stream_options.include_usage
            events = _events(form, pieces, answers, usage, has_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        async for piece in pieces:
            answers[piece.index].add(piece)
            if piece.finish_reason is not None:
                usage.completion_tokens += piece.num_tokens
        return JSONResponse(form.whole(answers, usage))

    async def tokenize(self, request: Request) -> dict[str, Any]:
        """The tokens of a text."""
        served, asked = await self._models.read(TokenizeRequest, request)
        ids = served.language.tokenizer.encode_batch([asked.prompt])[0]
        if served.with_bos and asked.add_special_tokens:
            ids = with_first(served.language.tokenizer.bos_id, ids)
        return {"tokens": ids, "count": len(ids), "max_model_len": served.engine.max_length}

    async def detokenize(self, request: Request) -> dict[str, str]:
        """The text of tokens."""
        served, asked = await self._models.read(DetokenizeRequest, request)
        served.check_ids(asked.tokens, "tokens")
        return {"prompt": served.language.tokenizer.decode(asked.tokens)}

    async def tokenizer_info(self, model: str | None = None) -> dict[str, Any]:
        """What clients that count tokens need to know."""
        served = self._models.default if model is None else self._models.find(model)
        tokenizer, template = served.language.tokenizer, served.template

        def spelled(id: int | None) -> str | None:
            return None if id is None else tokenizer.decode([id])

        return {
            "vocab_size": tokenizer.vocab_size,
            "bos_token": spelled(tokenizer.bos_id),
            "eos_token": spelled(tokenizer.eos_id),
            "eos_token_ids": list(served.language.eos_ids),
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


async def _beginnings(served: ServedModel, prompts: list[list[int]], asked: CompletionRequest) -> list[Answer]:
    """The prompts as beginnings of their answers, with log-probabilities if they are asked for."""
    found = []
    for ids in prompts:
        answer = Answer(served.language.tokenizer.decode(ids))
        if asked.logprobs is not None:
            score = partial(
                score_tokens,
                served.language.model,
                ids,
                asked.logprobs,
                served.language.tokenizer.vocab_size,
            )
            scores: list[Logprob] = await compute(served.engine, score)
            answer.ids, answer.logprobs = list(ids), [None, *scores]
        found.append(answer)
    return found


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
