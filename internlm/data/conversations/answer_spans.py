"""Finds the character spans of the answers in a rendered conversation.

Two methods: the marks of the template ({% generation %}), and the difference of prefixes. The latter renders the
conversation up to an answer with the generation prompt, and up to its end; both texts must be prefixes of the whole
conversation, so the answer is what the second has and the first has not, without the header that the generation prompt
provides. A template that renders a message differently when others follow is refused, not approximated.
"""

from __future__ import annotations

from itertools import pairwise

from internlm.data.conversations.chat_template import ChatTemplate
from internlm.data.conversations.row_forms import Conversation, Message
from internlm.utils.errors import DataError

MASK_METHODS = ("auto", "marks", "prefix")
LEARN = ("all", "last")
_SHOWN = 24
"""Characters of a difference that an error shows."""


def find_answers(
    conversation: Conversation, template: ChatTemplate, place: str, *, learn: str = "all", method: str = "auto"
) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation and find the answers with loss.

    Args:
        conversation: the conversation.
        template: the chat template.
        place: file and position of the row, for errors.
        learn: "all" answers, or the "last".
        method: "marks", "prefix", or "auto": marks if the template has them.

    Returns:
        the text, and the (start, end) characters of the answers, in order and without overlap.

    Raises:
        DataError: the template has no marks for "marks", or the answers cannot be separated exactly; names the place.
    """
    chosen = [number for number, has_loss in enumerate(conversation.has_loss) if has_loss]
    if learn == "last":
        # The last answer without loss leaves none: an earlier one is not the last.
        last = max((number for number, message in enumerate(conversation.messages) if _is_answer(message)), default=-1)
        chosen = [number for number in chosen if number == last]
    if method == "marks" and not template.has_marks(conversation.tools):
        raise DataError(
            f"{place}: the chat template of {template.name} has no {{% generation %}} marks: add them around the "
            "answers, or use mask = 'prefix' (--mask prefix)"
        )
    if method == "marks" or (method == "auto" and template.has_marks(conversation.tools)):
        text, spans = _by_marks(conversation, template, chosen, place)
    else:
        text, spans = _by_prefixes(conversation, template, chosen, place)
    if any(after[0] < before[1] for before, after in pairwise(spans)):
        raise DataError(f"{place}: the chat template of {template.name} renders answers that overlap: {spans}")
    return text, _join_adjacent(spans)


def _is_answer(message: Message) -> bool:
    """Whether the assistant says a message."""
    return bool(message["role"] == "assistant")


def _by_marks(
    conversation: Conversation, template: ChatTemplate, chosen: list[int], place: str
) -> tuple[str, list[tuple[int, int]]]:
    text, spans = template.render(conversation.messages, conversation.tools, place, with_marks=True)
    answers = [number for number, message in enumerate(conversation.messages) if _is_answer(message)]
    if chosen == answers and len(spans) >= len(answers):
        return text, spans
    if len(spans) != len(answers):
        raise DataError(
            f"{place}: the chat template of {template.name} marks {len(spans)} spans for {len(answers)} assistant "
            "messages, so answers and spans cannot be matched: use mask = 'prefix' (--mask prefix)"
        )
    return text, [span for number, span in zip(answers, spans, strict=True) if number in chosen]


def _by_prefixes(
    conversation: Conversation, template: ChatTemplate, chosen: list[int], place: str
) -> tuple[str, list[tuple[int, int]]]:
    messages, tools = conversation.messages, conversation.tools
    text, _ = template.render(messages, tools, place)
    spans = []
    for number in chosen:
        before, _ = template.render(messages[:number], tools, place, add_generation_prompt=True)
        through = text if number == len(messages) - 1 else template.render(messages[: number + 1], tools, place)[0]
        for prefix, what in ((before, "its generation prompt"), (through, "its end")):
            if not text.startswith(prefix):
                raise DataError(
                    f"{place}: message {number} cannot be separated exactly: in the chat template of {template.name}, "
                    f"the conversation up to {what} is no prefix of the whole one ({_difference(prefix, text)}). "
                    f"{_fix(number, messages)}"
                )
        if len(through) <= len(before):
            raise DataError(
                f"{place}: the chat template of {template.name} renders nothing for message {number}, an assistant's: "
                "remove the row, or name another template (--chat-template)"
            )
        _check_header(conversation, template, number, before, through, place)
        spans.append((len(before), len(through)))
    return text, spans


def _check_header(
    conversation: Conversation, template: ChatTemplate, number: int, before: str, through: str, place: str
) -> None:
    """Check that an answer starts with its content, where the template has no generation prompt.

    Raises:
        DataError: it starts with a header, which would be learned.
    """
    content = str(conversation.messages[number].get("content", "")).strip()
    if through[len(before) :].lstrip().startswith(content):
        return
    without, _ = template.render(conversation.messages[:number], conversation.tools, place)
    if without == before:
        header = through[len(before) :].partition(content)[0]
        raise DataError(
            f"{place}: message {number} cannot be separated exactly: the chat template of {template.name} has no "
            f"generation prompt (add_generation_prompt changes nothing), so {header[:_SHOWN]!r} before the answer "
            "would contribute loss. Add the prompt to the end of the template, or mark the answers with "
            "{% generation %} ... {% endgeneration %}"
        )


def _fix(number: int, messages: list[Message]) -> str:
    marks = "mark the answers in the template with {% generation %} ... {% endgeneration %}"
    is_last = not any(_is_answer(message) for message in messages[number + 1 :])
    return f"Either {marks}, or remove the row" if is_last else f"Use learn = 'last' (--learn last), or {marks}"


def _difference(prefix: str, text: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(prefix, text, strict=False)) if a != b), min(len(prefix), len(text)))
    return f"at character {at}, {prefix[at : at + _SHOWN]!r} against {text[at : at + _SHOWN]!r}"


def _join_adjacent(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start, end in spans:
        if start == end:
            continue
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, end))
    return joined
