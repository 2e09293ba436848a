"""The requests of the server: what each may hold, and what is refused.

Names and meanings are those of OpenAI's API (https://platform.openai.com/docs/api-reference), with vLLM's names for
what it lacks: `top_k`, `min_p`, `min_tokens`, `repetition_penalty`.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from internlm.apis.sampling import Sampling
from internlm.serve.language_model import LanguageModel
from internlm.utils.json_text import check_text

MAX_LOGPROBS = 20
MAX_SAMPLES = 128


class RequestError(Exception):
    """A request that cannot be answered.

    Attributes:
        status: of HTTP.
        message: names what is wrong.
        param: the field, if it is one.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param

    def body(self) -> dict[str, Any]:
        """As OpenAI's clients expect it."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.status}}


class _Strict(BaseModel):
    """Knows its fields only, and takes no text for a number."""

    model_config = ConfigDict(extra="forbid", strict=True)

    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Fields of the API that are not supported -> values that ask for nothing."""


class StreamOptions(_Strict):
    """What a stream has besides its texts."""

    include_usage: bool = False


_Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
"""With the number of a text added it is a seed still."""

_Bias = Annotated[float, Field(ge=-100, le=100)]


class _Choices(_Strict):
    """Fields that completions and chats share."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    seed: _Seed | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: dict[str, _Bias] | None = None
    user: str | None = None
    top_k: Annotated[int, Field(ge=-1)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    min_tokens: Annotated[int, Field(ge=0)] = 0
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0

    @property
    def stops(self) -> list[str]:
        """The stop texts."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    def sampling(self, language: LanguageModel, max_tokens: int, top_logprobs: int | None) -> Sampling:
        """The settings of its texts.

        Raises:
            RequestError: a value is impossible for this model.
        """
        vocabulary = language.tokenizer.vocab_size
        bias: dict[int, float] = {}
        for name, value in (self.logit_bias or {}).items():
            if not name.isdecimal() or int(name) >= vocabulary:
                raise RequestError(f"logit_bias: {name!r} is no token id below {vocabulary}", "logit_bias")
            bias[int(name)] = value
        if "" in self.stops or len(self.stops) > 16:
            raise RequestError("stop: at most 16 texts, none of them empty", "stop")
        if self.min_tokens > max_tokens:
            raise RequestError(f"min_tokens = {self.min_tokens} is more than the {max_tokens} tokens", "min_tokens")
        # At a temperature of 0 nothing but the most likely token is left of any filter.
        greedy = self.temperature == 0
        filters = (
            {}
            if greedy
            else {
                "temperature": max(self.temperature, 1e-6),
                "top_p": self.top_p,
                "top_k": max(self.top_k, 0),
                "min_p": self.min_p,
            }
        )
        sampling = Sampling(
            max_new_tokens=max_tokens,
            min_new_tokens=self.min_tokens,
            do_sample=not greedy,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=bias,
            eos_ids=language.eos_ids,
            num_tokens=vocabulary,
            top_logprobs=top_logprobs,
            seed=secrets.randbelow(2**62) if self.seed is None else self.seed,
            **filters,  # type: ignore[arg-type]
        )
        problems = sampling.problems()
        if problems:
            raise RequestError("; ".join(problems))
        return sampling


class CompletionRequest(_Choices):
    """`POST /v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = {"best_of": (None, 1), "suffix": (None, "")}


class ChatRequest(_Choices):
    """`POST /v1/chat/completions`."""

    messages: list[dict[str, Any]]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "tools": (None, []),
        "tool_choice": (None, "none"),
        "functions": (None, []),
        "function_call": (None, "none"),
        "parallel_tool_calls": (None,),
        "response_format": (None, {"type": "text"}),
        "modalities": (None, ["text"]),
        "audio": (None,),
        "prediction": (None,),
        "reasoning_effort": (None,),
        "store": (None, False),
        "service_tier": (None, "auto", "default"),
        "metadata": (None,),
        "web_search_options": (None,),
    }

    def chat(self) -> list[dict[str, Any]]:
        """The messages, each with a role and a text.

        Raises:
            RequestError: a message is something else.
        """
        if not self.messages:
            raise RequestError("messages: must have a message", "messages")
        return [_message(message, f"messages[{number}]") for number, message in enumerate(self.messages)]


class TokenizeRequest(_Strict):
    """`POST /tokenize`."""

    prompt: str
    add_special_tokens: bool = True
    model: str | None = None


class DetokenizeRequest(_Strict):
    """`POST /detokenize`."""

    tokens: list[int]
    model: str | None = None


class MegatronRequest(_Strict):
    """`PUT /api`, of Megatron-LM's text generation server."""

    prompts: list[str]
    tokens_to_generate: Annotated[int, Field(ge=1)] = 64
    logprobs: bool = False
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    add_BOS: bool = False  # noqa: N815
    random_seed: _Seed | None = None

    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "beam_width": (None,),
        "stop_token": (None,),
        "stop_on_eol": (None, False),
        "stop_on_double_eol": (None, False),
        "prevent_newline_after_colon": (None, False),
        "top_p_decay": (None, 0.0, 0),
        "top_p_bound": (None, 0.0, 0),
        "length_penalty": (None, 1, 1.0),
        "no_log": (None, True, False),
    }


Form = TypeVar("Form", bound=_Strict)


def parse(form: type[Form], body: bytes) -> Form:
    """Read a request.

    Raises:
        RequestError: it is no JSON object, or a field is unknown, unsupported or wrong.
    """
    try:
        values = json.loads(body, parse_constant=_refuse_constant)
        check_text(values)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON of texts and numbers: {error}") from None
    if not isinstance(values, dict):
        raise RequestError("the body must be a JSON object")
    for name, neutral in form.refused.items():
        if name in values:
            if not any(values[name] == each and type(values[name]) is type(each) for each in neutral):
                raise RequestError(f"{name} is not supported by this server; leave it out", name)
            del values[name]
    # Clients send null for what they leave out.
    optional = {name for name, field in form.model_fields.items() if not field.is_required()}
    values = {name: value for name, value in values.items() if not (value is None and name in optional)}
    try:
        return form.model_validate(values)
    except ValidationError as error:
        raise _named(error, form) from None


def _named(error: ValidationError, form: type[_Strict]) -> RequestError:
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else None
    if first["type"] == "extra_forbidden":
        return RequestError(f"{'.'.join(map(str, first['loc']))}: this server knows no such field", name)
    if name == "prompt" and form is CompletionRequest:
        kinds = "a text, a list of texts, a list of token ids, or a list of such lists"
        return RequestError(f"prompt: must be {kinds}", name)
    return RequestError(f"{name}: {first['msg']}", name)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _message(message: dict[str, Any], place: str) -> dict[str, Any]:
    unknown = sorted(set(message) - {"role", "content", "name"})
    if unknown:
        raise RequestError(f"{place}: {unknown[0]} is not supported by this server", "messages")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise RequestError(f"{place}: role must be a text, such as 'user'", "messages")
    if isinstance(content, list):
        texts = []
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise RequestError(f"{place}: content may have parts of type 'text' only", "messages")
            texts.append(part["text"])
        content = "".join(texts)
    if not isinstance(content, str):
        raise RequestError(f"{place}: content must be a text", "messages")
    return {**message, "content": content}


def finite(value: float) -> float:
    """A log-probability as JSON can hold it, which has no infinity."""
    return max(value, -9999.0) if not math.isnan(value) else -9999.0
