"""Multiple choice: which of several endings of a text the model finds likeliest.

Scores are those of lm-evaluation-harness's tasks of type multiple_choice. Evaluated in any layout, as an ending is
scored by forward passes of an evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from internlm.core.engine import Engine
from internlm.core.token_statistics import TokenSums
from internlm.data.batch import IGNORE_INDEX
from internlm.eval.endings import Encode, EncodedEnding, encode_endings
from internlm.eval.text_batches import TextBatches
from internlm.utils.errors import DataError
from internlm.utils.json_text import json_lines
from internlm.utils.logging import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class Question:
    """A text and its possible endings.

    Attributes:
        context: text in front of the endings.
        choices: endings, at least two.
        answer: index of the right one.
        place: file and line, for messages.
    """

    context: str
    choices: tuple[str, ...]
    answer: int
    place: str


def read_questions(path: Path) -> list[Question]:
    """Read objects with "context", "choices" and "answer", one on each line.

    Raises:
        DataError: the file cannot be read, has no line, or a line is something else.
    """
    return [_question(fields, place) for place, fields in json_lines(path, "question")]


def _question(fields: dict[str, Any], place: str) -> Question:
    form = 'must be {"context": TEXT, "choices": [TEXT, TEXT ...], "answer": INDEX of the right one}'
    context, choices, answer = (fields.get(name) for name in ("context", "choices", "answer"))
    are_texts = isinstance(choices, list) and all(isinstance(each, str) and each for each in choices)
    if not isinstance(context, str) or not isinstance(choices, list) or not are_texts or len(choices) < 2:
        raise DataError(f"{place}: {form}")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise DataError(f"{place}: answer = {answer!r} must be an index from 0 to {len(choices) - 1}")
    return Question(context, tuple(choices), answer, place)


class MultipleChoice:
    """A set of questions, tokenized.

    Endings are tokenized as `encode_endings` says. An empty context is the beginning-of-text token, or the end-of-text
    token.

    Args:
        questions: of the set.
        encode: of the run's tokenizer.
        prefix_id: token that stands for an empty context.
        batches: the shape of micro-batches.

    Raises:
        DataError: a question is longer than `batches.seq_len`, or an ending has no token of its own.
    """

    def __init__(
        self, questions: Sequence[Question], encode: Encode, prefix_id: int | None, batches: TextBatches
    ) -> None:
        self._questions = list(questions)
        self._batches = batches
        self._endings: list[EncodedEnding] = []
        for question in questions:
            self._endings += _endings(question, encode, prefix_id, batches.seq_len)

    def evaluate(self, engine: Engine) -> dict[str, float]:
        """Score all questions; collective, the same on all ranks.

        Returns:
            "choice_acc": share of questions whose right ending has the largest log-probability; "choice_acc_norm": the
            same divided by the number of its characters; "gold_bpb": bits per UTF-8 byte of the right ending, mean
            over questions.
        """
        scores = iter(self._scores(engine))
        right = right_norm = 0
        bits = 0.0
        for question in self._questions:
            own = [next(scores) for _ in question.choices]
            normed = [score / len(choice) for score, choice in zip(own, question.choices, strict=True)]
            right += own.index(max(own)) == question.answer
            right_norm += normed.index(max(normed)) == question.answer
            bits -= own[question.answer] / math.log(2) / len(question.choices[question.answer].encode())
        count = len(self._questions)
        return {"choice_acc": right / count, "choice_acc_norm": right_norm / count, "gold_bpb": bits / count}

    def _scores(self, engine: Engine) -> list[float]:
        """The log-probability of each ending in nats."""
        endings = self._endings
        groups = self._batches.groups([len(each.ids) for each in endings])
        rank, size = engine.context.index("data"), engine.context.size("data")
        # All data ranks have as many passes, as ranks of experts and of ZeRO take part in each.
        groups += [[]] * (-len(groups) % size)
        losses = torch.zeros((len(endings), 3), dtype=torch.float64, device=engine.context.device)
        for group in groups[rank::size]:
            own = [endings[number] for number in group]
            micro_batch, starts = self._batches.micro_batch([each.ids for each in own])
            labels = torch.full_like(micro_batch.labels, IGNORE_INDEX)
            type_ids = torch.zeros_like(micro_batch.type_ids)
            for place, (each, (row, column)) in enumerate(zip(own, starts, strict=True)):
                predicting = slice(column + each.start - 1, column + len(each.ids) - 1)
                labels[row, predicting] = torch.tensor(each.ids[each.start :])
                type_ids[row, predicting] = place
            num_valid = int((labels != IGNORE_INDEX).sum())
            sums = TokenSums(max(len(own), 1), engine.context.device)
            engine.evaluate(replace(micro_batch, labels=labels, type_ids=type_ids, num_valid_tokens=num_valid), sums)
            losses[group] = sums.values[: len(own)]
        return [-loss for loss, _, _ in engine.sum_over_tokens(losses).tolist()]


def _endings(question: Question, encode: Encode, prefix_id: int | None, seq_len: int) -> list[EncodedEnding]:
    try:
        endings = encode_endings([(question.context, choice) for choice in question.choices], encode, prefix_id)
    except DataError as error:
        raise DataError(f"{question.place}: {error}") from None
    for choice, ending in zip(question.choices, endings, strict=True):
        if ending.start == len(ending.ids):
            raise DataError(f"{question.place}: the choice {choice!r} has no token of its own behind its context")
        if len(ending.ids) > seq_len:
            raise DataError(
                f"{question.place}: {len(ending.ids)} tokens are more than data.seq_len = {seq_len}; shorten it"
            )
        if ending.is_joined:
            logger.warning(
                "%s: a token covers the end of the context and the beginning of %r; the score is that of "
                "lm-evaluation-harness, of other tokens. Begin the choice with a space, or end the context with one",
                question.place,
                choice,
            )
    return endings
