"""The HTTP server: an OpenAI-compatible API in front of one language model.

Needs fastapi. Owns paths, authentication, limits and streams; what requests may hold is in `requests.py`, the forms of
answers are in `answers.py`.
"""

from __future__ import annotations

import hmac
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from internlm.apis.engine import Logprob, Prompt, Text
from internlm.apis.sampling import Sampling
from internlm.apis.scoring import score_tokens
from internlm.data.conversations.chat_template import ChatTemplate
from internlm.serve.answers import Answer, ChatForm, CompletionForm, Form, Usage
from internlm.serve.engine_thread import EngineThread
from internlm.serve.pieces import Pieces, compute
from internlm.serve.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    MegatronRequest,
    RequestError,
    StreamOptions,
    TokenizeRequest,
    finite,
    parse,
)
from internlm.serve.requests import (
    Form as RequestForm,
)
from internlm.utils.errors import ConfigError, DataError

MAX_TEXTS = 1024
"""Texts of a request."""


@dataclass(frozen=True)
class ServerSettings:
    """Settings of the server.

    Attributes:
        name: of the model.
        template: of chats; None if the tokenizer has none.
        with_bos: put the beginning-of-text token in front of prompts that are texts.
        api_key: what requests must have as "Authorization: Bearer KEY"; None: nothing.
        max_body: bytes of a request.
        seconds: how long a request may take.
    """

    name: str
    template: ChatTemplate | None = None
    with_bos: bool = False
    api_key: str | None = None
    max_body: int = 8 << 20
    seconds: float = 600.0


def create_app(engine: EngineThread, settings: ServerSettings) -> FastAPI:
    """The application of a language model; the caller closes the engine."""
    app = FastAPI(title="internlm", docs_url=None, redoc_url=None, openapi_url=None)
    server = _Server(engine, settings)

    @app.middleware("http")
    async def check_key(request: Request, call_next: Any) -> Any:
        if settings.api_key is not None:
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), settings.api_key.encode()):
                return _error(RequestError("the key is missing or wrong: Authorization: Bearer KEY", status=401))
        return await call_next(request)

    @app.exception_handler(RequestError)
    async def refuse(_: Request, error: RequestError) -> JSONResponse:
        return _error(error)

    @app.exception_handler(HTTPException)
    async def no_path(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return _error(RequestError(message, status=error.status_code))

    app.get("/health")(server.health)
    app.get("/v1/models")(server.models)
    app.get("/v1/models/{name}")(server.model)
    app.post("/v1/completions", response_model=None)(server.completions)
    app.post("/v1/chat/completions", response_model=None)(server.chat_completions)
    app.post("/tokenize")(server.tokenize)
    app.post("/detokenize")(server.detokenize)
    app.get("/tokenizer_info")(server.tokenizer_info)
    app.put("/api")(server.megatron)
    return app


class _Server:
    def __init__(self, engine: EngineThread, settings: ServerSettings) -> None:
        self._engine = engine
        self._language = engine.language
        self._settings = settings
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
        self._check_model(name)
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
        asked = await self._read(CompletionRequest, request)
        prompts = [self._prompt_ids(prompt) for prompt in _prompts(asked.prompt)]
        num_new = asked.max_tokens if asked.max_tokens is not None else 16
        if num_new == 0 and not asked.echo:
            raise RequestError("max_tokens = 0 asks for nothing; add echo", "max_tokens")
        if asked.n * len(prompts) > MAX_TEXTS:
            raise RequestError(f"n: {asked.n * len(prompts)} texts are more than {MAX_TEXTS} in a request", "n")
        for ids in prompts:
            self._check_length(ids, num_new)
        sampling = asked.sampling(self._language, max(num_new, 1), asked.logprobs)
        starts = await self._beginnings(prompts, asked) if asked.echo else [Answer() for _ in prompts]
        starts = [
            replace(start, ids=[*start.ids], logprobs=[*start.logprobs]) for start in starts for _ in range(asked.n)
        ]
        usage = Usage(sum(map(len, prompts)))
        form = CompletionForm(
            self._settings.name, self._language.tokenizer, asked.logprobs is not None, len(prompts) * asked.n
        )
        texts = _texts(prompts, asked.n, sampling) if num_new else []
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
                    score_tokens, self._language.model, ids, asked.logprobs, self._language.tokenizer.vocab_size
                )
                scores: list[Logprob] = await compute(self._engine, score)
                answer.ids, answer.logprobs = list(ids), [None, *scores]
            found.append(answer)
        return found

    async def chat_completions(self, request: Request) -> JSONResponse | StreamingResponse:
        """Answer a conversation."""
        asked = await self._read(ChatRequest, request)
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
        self._check_length(ids, max(num_new, 1))
        if asked.top_logprobs is not None and not asked.logprobs:
            raise RequestError("top_logprobs needs logprobs = true", "top_logprobs")
        top = (asked.top_logprobs or 0) if asked.logprobs else None
        sampling = asked.sampling(self._language, num_new, top)
        form = ChatForm(self._settings.name, self._language.tokenizer, asked.logprobs, asked.stream)
        texts = _texts([ids], asked.n, sampling)
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
        asked = await self._read(TokenizeRequest, request)
        with_bos = self._settings.with_bos and asked.add_special_tokens
        ids = self._language.tokenizer.encode_batch([asked.prompt])[0]
        if with_bos and self._language.tokenizer.bos_id is not None:
            ids = [self._language.tokenizer.bos_id, *ids]
        return {"tokens": ids, "count": len(ids), "max_model_len": self._engine.max_length}

    async def detokenize(self, request: Request) -> dict[str, str]:
        """The text of tokens."""
        asked = await self._read(DetokenizeRequest, request)
        self._check_ids(asked.tokens, "tokens")
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

    async def megatron(self, request: Request) -> JSONResponse:
        """Continue prompts as Megatron-LM's server does."""
        asked = await self._read(MegatronRequest, request)
        language = self._language
        if not 1 <= len(asked.prompts) <= 128:
            raise RequestError("prompts: from 1 to 128 texts", "prompts")
        if asked.top_k and asked.top_p:
            raise RequestError("give top_k or top_p, not both", "top_p")
        prompts = [self._prompt_ids(prompt, with_bos=asked.add_BOS) for prompt in asked.prompts]
        for ids in prompts:
            self._check_length(ids, asked.tokens_to_generate)
        is_greedy = asked.top_k == 1
        filters = {"temperature": asked.temperature, "top_k": asked.top_k, "top_p": asked.top_p or 1.0}
        sampling = Sampling(
            max_new_tokens=asked.tokens_to_generate,
            do_sample=not is_greedy,
            eos_ids=language.eos_ids,
            num_tokens=language.tokenizer.vocab_size,
            top_logprobs=0 if asked.logprobs else None,
            seed=time.time_ns() if asked.random_seed is None else asked.random_seed,
            **({} if is_greedy else filters),  # type: ignore[arg-type]
        )
        answers = [Answer() for _ in prompts]
        texts = _texts(prompts, 1, sampling)
        scores: list[list[Logprob]] = []
        for ids in prompts if asked.logprobs else []:
            scores.append(await compute(self._engine, partial(score_tokens, language.model, ids)))
        pieces = Pieces(
            self._engine, texts, (), seconds=self._settings.seconds, is_disconnected=request.is_disconnected
        )
        async for piece in pieces:
            answers[piece.index].add(piece)
        decode = language.tokenizer.decode
        body: dict[str, Any] = {
            "text": [decode(ids) + answer.text for ids, answer in zip(prompts, answers, strict=True)],
            "segments": [
                [decode([id]) for id in (*ids, *answer.ids)] for ids, answer in zip(prompts, answers, strict=True)
            ],
        }
        if asked.logprobs:
            body["logprobs"] = [
                [finite(each.value) for each in (*own, *answer.logprobs) if each is not None]
                for own, answer in zip(scores, answers, strict=True)
            ]
        return JSONResponse(body)

    async def _read(self, form: type[RequestForm], request: Request) -> RequestForm:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._settings.max_body:
                raise RequestError(f"the body has more than {self._settings.max_body:,} bytes", status=413)
        asked = parse(form, bytes(body))
        name = getattr(asked, "model", None)
        if name is not None:
            self._check_model(name)
        return asked

    def _check_model(self, name: str) -> None:
        if name != self._settings.name:
            raise RequestError(
                f"the model '{name}' does not exist; this server has '{self._settings.name}'", "model", status=404
            )

    def _prompt_ids(self, prompt: str | list[int], with_bos: bool | None = None) -> list[int]:
        if isinstance(prompt, list):
            self._check_ids(prompt, "prompt")
            if not prompt:
                raise RequestError("prompt: a list of token ids must not be empty", "prompt")
            return prompt
        try:
            return self._language.encode(prompt, with_bos=self._settings.with_bos if with_bos is None else with_bos)
        except ConfigError as error:
            raise RequestError(f"prompt: {error}", "prompt") from None

    def _check_ids(self, ids: list[int], param: str) -> None:
        limit = self._language.tokenizer.vocab_size
        if not all(0 <= id < limit for id in ids):
            raise RequestError(f"{param}: token ids must be from 0 to {limit - 1}", param)

    def _check_length(self, ids: list[int], num_new: int) -> None:
        if len(ids) + num_new > self._engine.max_length:
            raise RequestError(
                f"{len(ids)} tokens of the prompt and {num_new} new ones are more than the {self._engine.max_length} "
                "that this server allows; shorten the prompt, or lower max_tokens"
            )


def _error(error: RequestError) -> JSONResponse:
    headers = {"Retry-After": "1"} if error.status == 429 else None
    return JSONResponse(error.body(), error.status, headers)


def _prompts(given: str | list[str] | list[int] | list[list[int]]) -> Sequence[str | list[int]]:
    if isinstance(given, str):
        return [given]
    if not given:
        raise RequestError("prompt: must not be empty", "prompt")
    if isinstance(given[0], int):
        return [given]
    return given


def _texts(prompts: Sequence[Sequence[int]], num_samples: int, sampling: Sampling) -> list[Text]:
    """The texts of each prompt, with seeds of their own."""
    starts = [Prompt(ids) for ids in prompts]
    return [
        Text(prompt, replace(sampling, seed=sampling.seed + number * num_samples + sample))
        for number, prompt in enumerate(starts)
        for sample in range(num_samples)
    ]


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
