"""Reads rows of instruction and chat data as messages, in the forms in which data sets have them.

Owns the forms, their columns, and the roles of ShareGPT. Must not know templates, tokenizers or files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from internlm.utils.errors import DataError, nearest

Message = dict[str, Any]
"""A message as chat templates read it: "role", "content", and optional keys such as "tool_calls"."""

_COLUMNS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_response": ("prompt", "response"),
    "prompt_completion": ("prompt", "completion"),
}
"""The columns that a row of each form must have."""
FORMS = tuple(_COLUMNS)
READ_COLUMNS = frozenset(name for names in _COLUMNS.values() for name in names) | {
    "input",
    "history",
    "system",
    "tools",
}
"""All columns that have a meaning; others are ignored."""
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_SHAREGPT_CALLS = ("function_call", "tool_call")
"""ShareGPT's names of an assistant's message whose text is the JSON of one or several tool calls."""


@dataclass(frozen=True)
class Conversation:
    """A conversation to render with a chat template.

    Attributes:
        messages: the messages, without keys that are None.
        has_loss: whether the loss may include each message: those of the assistant, except empty ones, those of weight
            0, and those of a prompt.
        tools: JSON schemas of the tools that the assistant may call; None without tools.
    """

    messages: list[Message]
    has_loss: list[bool]
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Completion:
    """A text and its continuation, which no chat template surrounds.

    Attributes:
        prompt: the context, without loss.
        completion: the continuation, with loss.
    """

    prompt: str
    completion: str


def detect_form(columns: Collection[str], place: str) -> str:
    """Return the form of rows with these columns.

    Args:
        columns: names of the columns.
        place: file and position, for errors.

    Raises:
        DataError: no form has these columns, or several have.
    """
    found = fitting_forms(columns)
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(
            f"{place} fits the forms {', '.join(found)} by its columns {sorted(columns)}: choose one with "
            f"form = '{found[0]}' (--conversations {found[0]})"
        )
    known = "; ".join(f"{form}: {', '.join(needed)}" for form, needed in _COLUMNS.items())
    raise DataError(
        f"{place} is not a conversation: its columns are {sorted(columns)}, and the forms need ({known}). "
        "Rename the columns"
    )


def fitting_forms(columns: Collection[str]) -> list[str]:
    """Return the forms whose columns these are."""
    return [form for form, needed in _COLUMNS.items() if all(name in columns for name in needed)]


def read_row(row: Any, form: str | None, place: str) -> Conversation | Completion:
    """Read a row as a conversation, or as a completion without a template.

    Args:
        row: the columns of the row.
        form: one of FORMS; None detects it from the columns that are not None.
        place: file and position, for errors.

    Raises:
        DataError: the row has another form, or a message is malformed; names the place.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{place} is {type(row).__name__}, not an object with columns such as 'messages'")
    columns = {name: value for name, value in row.items() if value is not None}
    form = detect_form(columns, place) if form is None else form
    if missing := [name for name in _COLUMNS[form] if name not in columns]:
        raise DataError(
            f"{place}: no '{missing[0]}', which the form '{form}' needs; its columns are "
            f"{sorted(columns)}.{nearest(missing[0], columns)}"
        )
    return _READERS[form](columns, place)


def _read_messages(row: Mapping[str, Any], place: str) -> Conversation:
    return _conversation(row, _messages(row["messages"], f"{place}: 'messages'"), place)


def _read_sharegpt(row: Mapping[str, Any], place: str) -> Conversation:
    return _conversation(row, _messages(row["conversations"], f"{place}: 'conversations'"), place)


def _read_alpaca(row: Mapping[str, Any], place: str) -> Conversation:
    instruction, output = (_text(row[name], f"{place}: '{name}'") for name in ("instruction", "output"))
    extra = _text(row.get("input", ""), f"{place}: 'input'")
    turns: list[Message] = []
    for number, turn in enumerate(row.get("history", [])):
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise DataError(f"{place}: 'history', turn {number}: expected a pair of question and answer, not {turn!r}")
        for role, value in zip(("user", "assistant"), turn, strict=True):
            turns.append({"role": role, "content": _text(value, f"{place}: 'history', turn {number}")})
    question = f"{instruction}\n{extra}" if extra else instruction
    return _conversation(row, [*turns, _turn("user", question), _turn("assistant", output)], place)


def _read_prompt_response(row: Mapping[str, Any], place: str) -> Conversation:
    return _prompt_and(row, "response", place)


def _read_prompt_completion(row: Mapping[str, Any], place: str) -> Conversation | Completion:
    if isinstance(row["prompt"], str) and isinstance(row["completion"], str):
        return Completion(*(_text(row[name], f"{place}: '{name}'") for name in ("prompt", "completion")))
    return _prompt_and(row, "completion", place)


_READERS: dict[str, Callable[[Mapping[str, Any], str], Conversation | Completion]] = {
    "messages": _read_messages,
    "sharegpt": _read_sharegpt,
    "alpaca": _read_alpaca,
    "prompt_response": _read_prompt_response,
    "prompt_completion": _read_prompt_completion,
}


def _prompt_and(row: Mapping[str, Any], name: str, place: str) -> Conversation:
    """A conversation of a prompt, without loss, and an answer; each is a text or a list of messages."""
    prompt, answer = (
        [_turn(role, _text(row[key], f"{place}: '{key}'"))]
        if isinstance(row[key], str)
        else _messages(row[key], f"{place}: '{key}'")
        for key, role in (("prompt", "user"), (name, "assistant"))
    )
    return _conversation(row, [*({**message, "weight": 0} for message in prompt), *answer], place)


def _conversation(row: Mapping[str, Any], messages: list[Message], place: str) -> Conversation:
    """A conversation of messages, with the 'system' and 'tools' columns of the row."""
    if system := row.get("system"):
        if any(message["role"] == "system" for message in messages):
            raise DataError(f"{place} has a 'system' column and a system message: remove one of them")
        messages = [_turn("system", _text(system, f"{place}: 'system'")), *messages]
    has_loss = []
    for number, message in enumerate(messages):
        weight = message.pop("weight", 1)
        if weight not in (0, 1):
            raise DataError(f"{place}: message {number}: 'weight' is {weight!r}; only 0 (no loss) and 1 are known")
        is_answer = message["role"] == "assistant" and not _is_empty(message)
        has_loss.append(bool(weight) and is_answer)
    return Conversation(messages, has_loss, _tools(row.get("tools"), place))


def _messages(value: Any, place: str) -> list[Message]:
    if isinstance(value, str):
        value = _parse_json(value, place)
    if not isinstance(value, list | tuple) or not value:
        raise DataError(f"{place}: expected a list of messages, not {_kind(value)}")
    return [_message(message, f"{place}, message {number}") for number, message in enumerate(value)]


def _message(value: Any, place: str) -> Message:
    """A message of OpenAI's form {"role", "content"} or ShareGPT's {"from", "value"}."""
    if not isinstance(value, Mapping):
        raise DataError(f"{place}: expected an object with 'role' and 'content', not {_kind(value)}")
    message = {name: item for name, item in value.items() if item is not None}
    if "from" in message and "role" not in message:
        message = _from_sharegpt(message, place)
    if not isinstance(message.get("role"), str):
        raise DataError(f"{place}: no 'role' (or ShareGPT's 'from') with a text; its keys are {sorted(value)}")
    if "content" in message:
        message["content"] = _content(message["content"], f"{place}: 'content'")
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message["tool_calls"], f"{place}: 'tool_calls'")
        if not message["tool_calls"]:
            del message["tool_calls"]
    elif "content" not in message:
        raise DataError(f"{place}: neither 'content' nor 'tool_calls'; its keys are {sorted(value)}")
    return message


def _from_sharegpt(message: Message, place: str) -> Message:
    rest = {name: value for name, value in message.items() if name not in ("from", "value")}
    name, value = message["from"], _text(message.get("value"), f"{place}: 'value'")
    if name in _SHAREGPT_CALLS:
        calls = _parse_json(value, f"{place}: 'value' of a {name}")
        calls = calls if isinstance(calls, list) else [calls]
        return {**rest, "role": "assistant", "tool_calls": calls}
    if name not in _SHAREGPT_ROLES:
        known = [*_SHAREGPT_ROLES, *_SHAREGPT_CALLS]
        raise DataError(f"{place}: 'from' is {name!r}; known are {', '.join(known)}.{nearest(str(name), known)}")
    return {**rest, "role": _SHAREGPT_ROLES[name], "content": value}


def _content(value: Any, place: str) -> str:
    """The text of a message; parts of type "text" are joined."""
    if isinstance(value, str):
        return _text(value, place)
    if not isinstance(value, list | tuple):
        raise DataError(f"{place}: expected a text or a list of parts, not {_kind(value)}")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, Mapping) else _kind(part)
        if kind != "text":
            raise DataError(f"{place} has a part of type {kind!r}: only text can be trained on; remove the row")
        texts.append(_text(part.get("text"), f"{place}: 'text'"))
    return "".join(texts)


def _tool_calls(value: Any, place: str) -> list[dict[str, Any]]:
    """Tool calls as {"type": "function", "function": {"name", "arguments"}}, with parsed arguments."""
    value = _parse_json(value, place) if isinstance(value, str) else value
    if not isinstance(value, list | tuple):
        raise DataError(f"{place}: expected a list of calls, not {_kind(value)}")
    calls = []
    for number, item in enumerate(value):
        call = dict(item) if isinstance(item, Mapping) else {}
        function = dict(call.get("function") or {name: call.pop(name, None) for name in ("name", "arguments")})
        if not isinstance(function.get("name"), str):
            raise DataError(f"{place}, call {number}: no function name; expected {{'name', 'arguments'}}, not {item!r}")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            # OpenAI's form is JSON text, but templates render an object as JSON.
            function["arguments"] = _parse_json(arguments, f"{place}, call {number}: 'arguments'") if arguments else {}
        rest = {name: item for name, item in call.items() if item is not None}
        calls.append({"type": "function", **rest, "function": function})
    return calls


def _tools(value: Any, place: str) -> list[dict[str, Any]] | None:
    if isinstance(value, str):
        value = _parse_json(value, f"{place}: 'tools'") if value.strip() else None
    if not value:
        return None
    if not isinstance(value, list | tuple) or not all(isinstance(tool, Mapping) for tool in value):
        raise DataError(f"{place}: 'tools' must be a list of JSON schemas, or its JSON text")
    tools = [_without_nulls(_parse_json(tool, place) if isinstance(tool, str) else tool) for tool in value]
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def _without_nulls(value: Any) -> Any:
    """A copy without keys that are None, which columns of parquet files have for keys that other rows need."""
    if isinstance(value, Mapping):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list | tuple) else value


def _is_empty(message: Message) -> bool:
    """Whether a message has no content but white space, as answers that a data set lacks."""
    values = [value for name, value in message.items() if name not in ("role", "name")]
    return not any(value.strip() if isinstance(value, str) else value for value in values)


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place}: expected text, not {_kind(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: a lone surrogate at character {error.start}: correct or remove the row") from error
    return value


def _parse_json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{place} is text, but not JSON: {error}") from error


def _kind(value: Any) -> str:
    return "an empty list" if isinstance(value, list | tuple) and not value else type(value).__name__
