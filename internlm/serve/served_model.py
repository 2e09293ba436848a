"""The model behind the server's APIs, and what every request is checked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastapi import Request

from internlm.apis.engine import Prompt, Text
from internlm.apis.sampling import Sampling
from internlm.data.conversations.chat_template import ChatTemplate
from internlm.serve.engine_thread import EngineThread
from internlm.serve.requests import Form, RequestError, parse
from internlm.utils.errors import ConfigError


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


class ServedModel:
    """A language model in an engine, with the settings of its server.

    Attributes:
        engine: continues texts.
        language: the model, which only the engine may use.
        settings: of the server.
    """

    def __init__(self, engine: EngineThread, settings: ServerSettings) -> None:
        self.engine = engine
        self.language = engine.language
        self.settings = settings

    async def read(self, form: type[Form], request: Request) -> Form:
        """The body of a request.

        Raises:
            RequestError: it is too large, has something else than the form, or asks for another model.
        """
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self.settings.max_body:
                raise RequestError(f"the body has more than {self.settings.max_body:,} bytes", status=413)
        asked = parse(form, bytes(body))
        name = getattr(asked, "model", None)
        if name is not None:
            self.check_model(name)
        return asked

    def check_model(self, name: str) -> None:
        """Refuse the name of another model with 404."""
        if name != self.settings.name:
            raise RequestError(
                f"the model '{name}' does not exist; this server has '{self.settings.name}'", "model", status=404
            )

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
            return self.language.encode(prompt, with_bos=self.settings.with_bos if with_bos is None else with_bos)
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


def texts_of(prompts: Sequence[Sequence[int]], num_samples: int, sampling: Sampling) -> list[Text]:
    """The texts of each prompt, with seeds of their own."""
    starts = [Prompt(ids) for ids in prompts]
    return [
        Text(prompt, replace(sampling, seed=sampling.seed + number * num_samples + sample))
        for number, prompt in enumerate(starts)
        for sample in range(num_samples)
    ]
