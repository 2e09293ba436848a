"""How an instruction record becomes a text for a model: prompt formats, and which part of them is learned.

Owns the words and the special tokens around instruction, input and output. Knows no files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from internlm.data.tokenize.text_tokenizer import TextTokenizer, check_code
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
"""The prompts that models trained on the Alpaca data expect, to the letter."""
_INTERNEVO_IDS = {"<eoh>": 103167, "<eoa>": 103166, "<0x0A>": 13}
"""Ends of the user's and of the model's turn, and a new line, as InternEvo's tool writes them for every tokenizer."""
_INTERNEVO_MAX_TOKENS = 2048

Record = dict[str, str]
"""The texts "instruction", "input" (may be empty) and "output"."""


@dataclass(frozen=True)
class PromptSegment:
    """A part of an example: text, or ids as they are. What is not `learned` is read by the model and no label."""

    content: str | Sequence[int]
    learned: bool


@dataclass(frozen=True)
class PromptFormat:
    """How a record becomes an example.

    Attributes:
        segments: of a record, in order.
        end: ids behind them, learned.
        max_tokens: longer examples are cut to this, `end` included; None cuts nothing.
        add_bos: whether examples begin with the tokenizer's bos.
        notices: what a user should know of the format with this tokenizer, a line each.
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
        ids, learned: of equal length; whether each token contributes loss.
        cut_tokens: tokens that `max_tokens` cut off.
        has_answer: whether a token of the answer is left to learn.
    """

    ids: list[int]
    learned: list[bool]
    cut_tokens: int
    has_answer: bool

    def labels_within(self, seq_len: int | None) -> int:
        """Labels among the first `seq_len` positions: learned tokens that have one before them."""
        return sum(self.learned[1 : None if seq_len is None else seq_len + 1])


def prompt_format(
    name: str, tokenizer: TextTokenizer, path: Path, *, add_bos: bool = False, trust_remote_code: bool = False
) -> PromptFormat:
    """One of PROMPT_FORMATS, with the special tokens of a tokenizer.

    A chat template owns all special tokens: those before the response (a bos, for example) are masked, and all that it
    puts behind it (end of turn, newline) is learned.

    Args:
        path: where the tokenizer was loaded from.
        add_bos: begin with the tokenizer's bos ("alpaca" only; "internevo" always does, a chat template has its own).
        trust_remote_code: run the code of a tokenizer that is nothing else.
    Raises:
        DataError: the tokenizer lacks a token or a template that the format needs.
    """
    if name == "chat-template":
        return PromptFormat(_chat_segments(path, trust_remote_code))
    if tokenizer.eos_id is None:
        raise DataError(f"{path}: the tokenizer names no eos token, so a model could not learn where a response ends")
    if name == "internevo":
        return _internevo(tokenizer, path)
    if add_bos and tokenizer.bos_id is None:
        raise DataError(f"{path}: the tokenizer names no bos token; leave out --bos")
    before = [PromptSegment([tokenizer.bos_id], False)] if add_bos and tokenizer.bos_id is not None else []

    def segments(record: Record) -> list[PromptSegment]:
        template = _WITH_INPUT if record["input"] else _WITHOUT_INPUT
        prompt = template.format(instruction=record["instruction"], input=record["input"])
        return [*before, PromptSegment(prompt, False), PromptSegment(record["output"], True)]

    return PromptFormat(segments, [tokenizer.eos_id], add_bos=add_bos)


def encode_examples(records: Iterable[Record], form: PromptFormat, tokenizer: TextTokenizer) -> Iterator[Example]:
    """Each record as an example. Segments are encoded apart: at generation a prompt is encoded without its response."""
    remaining = iter(records)
    while batch := [form.segments(record) for record in islice(remaining, _BATCH)]:
        texts = [segment.content for segments in batch for segment in segments if isinstance(segment.content, str)]
        encoded = iter(tokenizer.encode_batch(texts))
        for segments in batch:
            ids: list[int] = []
            learned: list[bool] = []
            for segment in segments:
                part = next(encoded) if isinstance(segment.content, str) else segment.content
                ids += part
                learned += [segment.learned] * len(part)
            room = len(ids) if form.max_tokens is None else form.max_tokens - len(form.end)
            ends = [*learned[:room], *[True] * len(form.end)]
            yield Example([*ids[:room], *form.end], ends, max(0, len(ids) - room), any(learned[1:room]))


def _chat_segments(path: Path, trust_remote_code: bool) -> Callable[[Record], list[PromptSegment]]:
    """Prompt and response by the tokenizer's own chat template, which owns all special tokens."""
    from transformers import AutoTokenizer

    folder = path if path.is_dir() else path.parent
    check_code(folder, trust_remote_code)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (ValueError, OSError) as error:
        raise DataError(f"{folder}: --chat-template needs a Hugging Face tokenizer folder: {error}") from error
    if not tokenizer.chat_template:
        raise DataError(f"{folder}: the tokenizer has no chat template; leave out --chat-template")

    def segments(record: Record) -> list[PromptSegment]:
        question = record["instruction"] + ("\n" + record["input"] if record["input"] else "")
        asked = [{"role": "user", "content": question}]
        answered = [*asked, {"role": "assistant", "content": record["output"]}]
        prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(answered, tokenize=False)
        if not whole.startswith(prompt):
            raise DataError(
                f"{folder}: the chat template does not continue its own generation prompt, so the response cannot be "
                f"told from the prompt {prompt!r}; leave out --chat-template"
            )
        return [PromptSegment(prompt, False), PromptSegment(whole[len(prompt) :], True)]

    return segments


def _internevo(tokenizer: TextTokenizer, path: Path) -> PromptFormat:
    """The format of InternEvo's tool: <s><|User|>:...<eoh> newline <|Bot|>:...<eoa> newline </s>."""
    if tokenizer.bos_id is None or tokenizer.eos_id is None:
        raise DataError(f"{path}: the tokenizer names no bos token, with which InternEvo's format begins")
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
    """The tokenizer's own ids of these tokens, and InternEvo's of those that it does not have."""
    own = {piece: id for id, piece in enumerate(tokenizer.pieces()) if piece in _INTERNEVO_IDS}
    return _INTERNEVO_IDS | own


def _internevo_notices(tokenizer: TextTokenizer, ids: dict[str, int]) -> list[str]:
    notices = []
    if changed := [name for name, id in _INTERNEVO_IDS.items() if ids[name] != id]:
        pairs = ", ".join(f"{name} {ids[name]} for {_INTERNEVO_IDS[name]}" for name in changed)
        notices.append(f"ids of this tokenizer where InternEvo's tool writes those of its own: {pairs}")
    if outside := [name for name, id in ids.items() if id >= tokenizer.vocab_size]:
        pairs = ", ".join(f"{name} {ids[name]}" for name in outside)
        notices.append(
            f"the tokenizer has no {pairs}: InternEvo's ids, beyond its {tokenizer.vocab_size:,}; the model needs "
            f"model.vocab_size >= {max(ids.values()) + 1}"
        )
    return notices
