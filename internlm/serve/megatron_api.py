"""The request of Megatron-LM's text generation server, `PUT /api`."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse

from internlm.apis.engine import Logprob
from internlm.apis.sampling import Sampling
from internlm.apis.scoring import score_tokens
from internlm.serve.answers import Answer
from internlm.serve.pieces import Pieces, compute
from internlm.serve.requests import MegatronRequest, RequestError, finite
from internlm.serve.served_model import ServedModels, texts_of


class MegatronApi:
    """Answers Megatron-LM's requests.

    Args:
        models: of the server; the default one answers, as requests name none.
    """

    def __init__(self, models: ServedModels) -> None:
        self._models = models

    async def generate(self, request: Request) -> JSONResponse:
        """Continue prompts."""
        served, asked = await self._models.read(MegatronRequest, request)
        language = served.language
        if not 1 <= len(asked.prompts) <= 128:
            raise RequestError("prompts: from 1 to 128 texts", "prompts")
        if asked.top_k and asked.top_p:
            raise RequestError("give top_k or top_p, not both", "top_p")
        prompts = [served.prompt_ids(prompt, with_bos=asked.add_BOS) for prompt in asked.prompts]
        for ids in prompts:
            served.check_length(ids, asked.tokens_to_generate)
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
        texts = texts_of(prompts, 1, sampling)
        scores: list[list[Logprob]] = []
        for ids in prompts if asked.logprobs else []:
            scores.append(await compute(served.engine, partial(score_tokens, language.model, ids)))
        pieces = Pieces(
            served.engine,
            texts,
            (),
            seconds=self._models.settings.seconds,
            is_disconnected=request.is_disconnected,
        )
        async for piece in pieces:
            answers[piece.index].add(piece)
        decode = language.tokenizer.decode
        body: dict[str, Any] = {
            "text": [decode(ids) + answer.text for ids, answer in zip(prompts, answers, strict=True)],
            "segments": [
                [served.tokens.text_of(id) for id in (*ids, *answer.ids)]
                for ids, answer in zip(prompts, answers, strict=True)
            ],
        }
        if asked.logprobs:
            body["logprobs"] = [
                [finite(each.value) for each in (*own, *answer.logprobs) if each is not None]
                for own, answer in zip(scores, answers, strict=True)
            ]
        return JSONResponse(body)
