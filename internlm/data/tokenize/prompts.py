"""Prompt formats: the text of an instruction record, and which parts of it are masked.

Owns the text and special tokens around instruction, input and output. Must not know files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from internlm.data.conversations.chat_template import load_chat_template
from internlm.data.tokenize.text_tokenizer import TextTokenizer
from internlm.utils.errors import DataError

PROMPT_FORMATS = ("alpaca", "chat-template", "internevo")
_BATCH = 256
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
"""The exact prompts that models trained on the Alpaca data expect."""
_INTERNEVO_IDS = {"<eoh>": 103167, "<eoa>": 103166, "<0x0A>": 13}
"""Ids of the ends of the user's and the model's turn, and of newline, that InternEvo's tool uses for any tokenizer."""
_INTERNEVO_MAX_TOKENS = 2048

Record = dict[str, str]
"""A record: the texts "instruction", "input" (may be empty) and "output"."""


@dataclass(frozen=True)
class PromptSegment:
    """A part of an example.

    Attributes:
        content: text, or ids.
        has_loss: whether its tokens contribute loss; otherwise they are context only.
    """

    content: str | Sequence[int]
    has_loss: bool


@dataclass(frozen=True)
class PromptFormat:
    """Conversion of records to examples.

    Attributes:
        segments: splits a record into its segments, in order.
        end: ids after the segments, with loss.
        max_tokens: length to which examples are truncated, with `end`; None truncates nothing.
        add_bos: whether examples start with the bos of the tokenizer.
        notices: peculiarities of the format with this tokenizer, one line each.
    """

    segments: Callable[[Record], list[PromptSegment]]
    end: Sequence[int] = ()
    max_tokens: int | None = None
    add_bos: bool = False
    notices: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Example:
    """A tokenized record.

    Attributes:
        ids: token ids.
        loss_mask: whether each token contributes loss; as long as `ids`.
        num_truncated: number of tokens removed by `max_tokens`.
        has_answer: whether a token of the answer with loss is left.
    """

    ids: list[int]
    loss_mask: list[bool]
    num_truncated: int
    has_answer: bool

    def labels_within(self, seq_len: int | None) -> int:
        """Number of labels of the first `seq_len` positions: the first token is never a label."""
        return sum(self.loss_mask[1 : None if seq_len is None else seq_len + 1])


def build_prompt_format(
    name: str, tokenizer: TextTokenizer, path: Path, *, add_bos: bool = False, trust_remote_code: bool = False
) -> PromptFormat:
    """Build a prompt format with the special tokens of a tokenizer.

    A chat template provides all special tokens: those before the response, such as bos, are masked, and what follows
    the response (end of turn, newline) has loss.

    Args:
        name: one of PROMPT_FORMATS.
        tokenizer: the tokenizer.
        path: path of the tokenizer.
        add_bos: whether to start with bos ("alpaca" only; "internevo" always does, a chat template decides itself).
        trust_remote_code: whether to run custom code of the tokenizer folder.

    Raises:
        DataError: the tokenizer lacks a token or a template that the format needs.
    """
    if name == "chat-template":
        return PromptFormat(_chat_segments(path, trust_remote_code))
    if tokenizer.eos_id is None:
        raise DataError(f"{path}: the tokenizer names no eos token, so a model cannot learn where a response ends")
    if name == "internevo":
        return _internevo(tokenizer, path)
    if add_bos and tokenizer.bos_id is None:
        raise DataError(f"{path}: the tokenizer names no bos token; drop --bos")
    before = [PromptSegment([tokenizer.bos_id], False)] if add_bos and tokenizer.bos_id is not None else []

    def segments(record: Record) -> list[PromptSegment]:
        template = _WITH_INPUT if record["input"] else _WITHOUT_INPUT
        prompt = template.format(instruction=record["instruction"], input=record["input"])
        return [*before, PromptSegment(prompt, False), PromptSegment(record["output"], True)]

    return PromptFormat(segments, [tokenizer.eos_id], add_bos=add_bos)


def encode_examples(records: Iterable[Record], prompts: PromptFormat, tokenizer: TextTokenizer) -> Iterator[Example]:
    """Tokenize records. Segments are encoded separately, because generation encodes a prompt without its response."""
    remaining = iter(records)
    while batch := [prompts.segments(record) for record in islice(remaining, _BATCH)]:
        texts = [segment.content for segments in batch for segment in segments if isinstance(segment.content, str)]
        encoded = iter(tokenizer.encode_batch(texts))
        for segments in batch:
            ids: list[int] = []
            loss_mask: list[bool] = []
            for segment in segments:
                part = next(encoded) if isinstance(segment.content, str) else segment.content
                ids += part
                loss_mask += [segment.has_loss] * len(part)
            limit = len(ids) if prompts.max_tokens is None else prompts.max_tokens - len(prompts.end)
            yield Example(
                [*ids[:limit], *prompts.end],
                [*loss_mask[:limit], *[True] * len(prompts.end)],
                num_truncated=max(0, len(ids) - limit),
                has_answer=any(loss_mask[1:limit]),
            )


def _chat_segments(path: Path, trust_remote_code: bool) -> Callable[[Record], list[PromptSegment]]:
    """Prompt and response by the chat template of the tokenizer, which provides all special tokens."""
    template = load_chat_template(path, trust_remote_code=trust_remote_code)

    def segments(record: Record) -> list[PromptSegment]:
        question = record["instruction"] + ("\n" + record["input"] if record["input"] else "")
        user_turn = [{"role": "user", "content": question}]
        both_turns = [*user_turn, {"role": "assistant", "content": record["output"]}]
        place = f"the record with the instruction {record['instruction'][:40]!r}"
        prompt, _ = template.render(user_turn, None, place, add_generation_prompt=True)
        conversation, _ = template.render(both_turns, None, place)
        if not conversation.startswith(prompt):
            raise DataError(
                f"{template.name}: a conversation in the chat template does not start with its generation prompt "
                f"{prompt!r}, so prompt and response cannot be separated; drop --chat-template"
            )
        return [PromptSegment(prompt, False), PromptSegment(conversation[len(prompt) :], True)]

    return segments


def _internevo(tokenizer: TextTokenizer, path: Path) -> PromptFormat:
    """The format of InternEvo's tool: <s><|User|>:...<eoh> newline <|Bot|>:...<eoa> newline </s>."""
    if tokenizer.bos_id is None or tokenizer.eos_id is None:
        raise DataError(f"{path}: the tokenizer names no bos token, with which InternEvo's format starts")
    ids = _internevo_ids(tokenizer)
    bos, newline = tokenizer.bos_id, ids["<0x0A>"]

    def segments(record: Record) -> list[PromptSegment]:
        question = record["instruction"] + ("\n" + record["input"] if record["input"] else "")
        return [
            PromptSegment([bos], True),
            PromptSegment(f"<|User|>:{question}", False),
            PromptSegment([ids["<eoh>"], newline], False),
            PromptSegment("<|Bot|>:", False),
            PromptSegment(record["output"], True),
            PromptSegment([ids["<eoa>"], newline], True),
        ]

    return PromptFormat(
        segments, [tokenizer.eos_id], _INTERNEVO_MAX_TOKENS, add_bos=True, notices=_internevo_notices(tokenizer, ids)
    )


def _internevo_ids(tokenizer: TextTokenizer) -> dict[str, int]:
    """The ids of these tokens in the tokenizer, and InternEvo's for tokens that it lacks."""
    own = {piece: id for id, piece in enumerate(tokenizer.pieces()) if piece in _INTERNEVO_IDS}
    return _INTERNEVO_IDS | own


def _internevo_notices(tokenizer: TextTokenizer, ids: dict[str, int]) -> list[str]:
    notices = []
    if changed := [name for name, id in _INTERNEVO_IDS.items() if ids[name] != id]:
        pairs = ", ".join(f"{name} {ids[name]} for {_INTERNEVO_IDS[name]}" for name in changed)
        notices.append(f"ids of this tokenizer instead of the fixed ids of InternEvo's tool: {pairs}")
    if outside := [name for name, id in ids.items() if id >= tokenizer.vocab_size]:
        pairs = ", ".join(f"{name} {ids[name]}" for name in outside)
        notices.append(
            f"the tokenizer has no {pairs}: InternEvo's ids, beyond its {tokenizer.vocab_size:,}; the model needs "
            f"model.vocab_size >= {max(ids.values()) + 1}"
        )
    return notices
