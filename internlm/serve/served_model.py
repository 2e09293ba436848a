"""The models behind the server's APIs, and what every request is checked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fastapi import Request
from starlette.requests import ClientDisconnect

from internlm.apis.engine import Prompt, Text
from internlm.apis.sampling import Sampling
from internlm.data.conversations.chat_template import ChatTemplate
from internlm.serve.engine_thread import EngineThread
from internlm.serve.pieces import CLOSED
from internlm.serve.requests import Form, RequestError, parse
from internlm.serve.token_texts import TokenTexts
from internlm.utils.errors import ConfigError


@dataclass(frozen=True)
class ServerSettings:
    """Settings of the server.

    Attributes:
        api_key: what requests must have as "Authorization: Bearer KEY"; None: nothing.
        max_body: bytes of a request.
        seconds: how long a request may take.
    """

    api_key: str | None = None
    max_body: int = 8 << 20
    seconds: float = 600.0


class ServedModel:
    """A language model in an engine, under the name that requests ask for.

    Args:
        engine: continues texts.
        name: of the model.
        template: of chats; None if the tokenizer has none.
        with_bos: put the beginning-of-text token in front of prompts that are texts.

    Attributes:
        language: the model, which only the engine may use.
        tokens: what its tokens say.
    """

    def __init__(
        self, engine: EngineThread, name: str, template: ChatTemplate | None = None, *, with_bos: bool = False
    ) -> None:
        self.engine = engine
        self.language = engine.language
        self.tokens = TokenTexts(self.language.tokenizer)
        self.name = name
        self.template = template
        self.with_bos = with_bos

    def prompt_ids(self, prompt: str | list[int], with_bos: bool | None = None) -> list[int]:
        """The tokens of a prompt, which may be tokens.

        Args:
            prompt: of a request.
            with_bos: whether a text begins with the beginning-of-text token; None: as the settings say.

        Raises:
            RequestError: it has no token, or one that does not exist.
        """
        if isinstance(prompt, list):
            self.check_ids(prompt, "prompt")
            if not prompt:
                raise RequestError("prompt: a list of token ids must not be empty", "prompt")
            return prompt
        try:
            return self.language.encode(prompt, with_bos=self.with_bos if with_bos is None else with_bos)
        except ConfigError as error:
            raise RequestError(f"prompt: {error}", "prompt") from None

    def check_ids(self, ids: list[int], param: str) -> None:
        """Refuse ids that are no tokens; `param` is the field that has them."""
        limit = self.language.tokenizer.vocab_size
        if not all(0 <= id < limit for id in ids):
            raise RequestError(f"{param}: token ids must be from 0 to {limit - 1}", param)

    def check_length(self, ids: list[int], num_new: int) -> None:
        """Refuse more tokens than a row of the engine has."""
        if len(ids) + num_new > self.engine.max_length:
            raise RequestError(
                f"{len(ids)} tokens of the prompt and {num_new} new ones are more than the {self.engine.max_length} "
                "that this server allows; shorten the prompt, or lower max_tokens"
            )


class ServedModels:
    """The models of a server, by name.

    Args:
        models: with names of their own; the first one answers requests that name none.
        settings: of the server.
    """

    def __init__(self, models: Sequence[ServedModel], settings: ServerSettings) -> None:
        self._by_name = {model.name: model for model in models}
        self.settings = settings

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._by_name.values())

    @property
    def default(self) -> ServedModel:
        """The model of requests that name none."""
        return next(iter(self))

    def find(self, name: str) -> ServedModel:
        """The model of that name; another name is refused with 404."""
        if name not in self._by_name:
            known = ", ".join(f"'{each}'" for each in self._by_name)
            raise RequestError(f"the model '{name}' does not exist; this server has {known}", "model", status=404)
        return self._by_name[name]

    async def read(self, form: type[Form], request: Request) -> tuple[ServedModel, Form]:
        """The model that a request asks for, and its body.

        Raises:
            RequestError: it is too large or incomplete, has something else than the form, or asks for an unknown model.
        """
        body = bytearray()
        try:
            async for chunk in request.stream():
                body += chunk
                if len(body) > self.settings.max_body:
                    raise RequestError(f"the body has more than {self.settings.max_body:,} bytes", status=413)
        except ClientDisconnect:
            raise RequestError("the client has gone", status=CLOSED) from None
        asked = parse(form, bytes(body))
        name = getattr(asked, "model", None)
        return self.default if name is None else self.find(name), asked


def texts_of(prompts: Sequence[Sequence[int]], num_samples: int, sampling: Sampling) -> list[Text]:
    """The texts of each prompt, with seeds of their own."""
    starts = [Prompt(ids) for ids in prompts]
    return [
        Text(prompt, replace(sampling, seed=sampling.seed + number * num_samples + sample))
        for number, prompt in enumerate(starts)
        for sample in range(num_samples)
    ]
