"""Multiple-choice questions have the same scores in every layout: those of a pass over each ending alone."""

from __future__ import annotations

import math

import pytest
from helpers.resume import Ranks

# Before any fork.
import internlm.verify.warm_up  # noqa: F401
from internlm.apis.scoring import score_tokens
from internlm.eval.multiple_choice import MultipleChoice, Question
from internlm.eval.text_batches import TextBatches
from internlm.verify.case import Case, Combination
from internlm.verify.run import CaseRun, start_case

QUESTIONS = [
    Question("abc", ("de", "f", "ghi"), 1, "1"),
    Question("", ("ab", "c"), 0, "2"),
    Question("hello ", ("x", "yz"), 1, "3"),
    Question("m", ("nopqrstu", "v", "w", "x"), 3, "4"),
    Question("k", ("lm", "no"), 0, "5"),
]
BOS = 1


def encode(texts: list[str]) -> list[list[int]]:
    """One token a character."""
    return [[2 + ord(letter) % 50 for letter in text] for text in texts]


def scored(case: Case) -> tuple[list[float], dict[str, float]]:
    context = start_case(case)
    run = CaseRun(case, context)
    run.train(2)
    run.trainer.engine.optimizer.finish_gathering()
    data = case.config.data
    batches = TextBatches(data.seq_len, data.micro_bsz, data.use_packed_dataset)
    choices = MultipleChoice(QUESTIONS, encode, BOS, batches)
    found = choices._scores(run.trainer.engine), choices.evaluate(run.trainer.engine)
    run.train(3)  # the run goes on
    context.close()
    return found


def one_by_one(case: Case) -> list[float]:
    """The log-probability of each ending, by a pass over its text."""
    context = start_case(case)
    run = CaseRun(case, context)
    run.train(2)
    run.trainer.engine.optimizer.finish_gathering()
    model = run.trainer.engine.chunks[0].eval()
    found = []
    for question in QUESTIONS:
        for choice in question.choices:
            (start,) = encode([question.context.rstrip()])
            (whole,) = encode([question.context + choice])
            start, whole = (start, whole) if start else ([BOS], [BOS, *whole])
            values = [each.value for each in score_tokens(model, whole)]  # type: ignore[arg-type]
            found.append(sum(values[len(start) - 1 :]))
    context.close()
    return found


@pytest.mark.parametrize(
    "line",
    [
        "ranks=1",
        "ranks=1 documents:packed=false",
        "ranks=2",
        "ranks=4 layout:tensor=2,mode=isp,weight=2,pipeline=2",
        "ranks=2 layout:tensor=2,mode=mtp documents:packed=false",
        "ranks=2 layout:context=2,context_cut=zigzag",
        "ranks=2 layout:fsdp",
    ],
)
def test_every_layout_scores_as_one_process_does(line: str, ranks: Ranks) -> None:
    case = Combination.parse(f"{line} model:dtype=float64").case()
    (expected,) = ranks(1).run(one_by_one, case.reference())
    for scores, results in ranks(case.world_size).run(scored, case):
        assert scores == pytest.approx(expected, rel=1e-5)
        assert results == pytest.approx(results_of(expected))


def results_of(scores: list[float]) -> dict[str, float]:
    values = iter(scores)
    right, norm, bits = 0, 0, 0.0
    for question in QUESTIONS:
        own = [next(values) for _ in question.choices]
        by_length = [value / len(choice) for value, choice in zip(own, question.choices, strict=True)]
        right += max(range(len(own)), key=own.__getitem__) == question.answer
        norm += max(range(len(own)), key=by_length.__getitem__) == question.answer
        bits += -own[question.answer] / math.log(2) / len(question.choices[question.answer])
    return {"choice_acc": right / 5, "choice_acc_norm": norm / 5, "gold_bpb": bits / 5}
