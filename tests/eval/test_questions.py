"""Files of multiple-choice questions, and a run that scores them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from end_to_end.test_sample_texts import folder, run  # noqa: F401
from helpers.forked import run_forked

from internlm.eval.multiple_choice import MultipleChoice, Question, read_questions
from internlm.eval.text_batches import TextBatches
from internlm.utils.errors import DataError

ROW = {"context": "ab", "choices": ["c", "de"], "answer": 1}


def test_lines_become_questions(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n\n{json.dumps({**ROW, 'more': 1, 'answer': 0})}\n")
    first, second = read_questions(path)
    assert first == Question("ab", ("c", "de"), 1, f"{path}, line 1")
    assert (second.answer, second.place) == (0, f"{path}, line 3")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "no question in this file"),
        ("{", "line 1: not a question: "),
        ("[]", "line 1: not a question: expected a JSON object"),
        (json.dumps({**ROW, "choices": ["c"]}), "line 1: must be"),
        (json.dumps({**ROW, "choices": ["c", ""]}), "line 1: must be"),
        (json.dumps({**ROW, "context": None}), "line 1: must be"),
        (json.dumps({**ROW, "answer": 2}), "line 1: answer = 2 must be an index from 0 to 1"),
        (json.dumps({**ROW, "answer": True}), "line 1: answer = True"),
        (json.dumps({**ROW, "answer": -1}), "line 1: answer = -1"),
    ],
)
def test_mistakes_in_files(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "q.jsonl").write_text(line)
    with pytest.raises(DataError, match=r"q\.jsonl") as error:
        read_questions(tmp_path / "q.jsonl")
    assert message in str(error.value)


def test_endings_are_tokenized_with_their_context() -> None:
    """White space at the end of a context belongs to the ending, and an empty context is a token."""
    seen: list[str] = []

    def encode(texts: list[str]) -> list[list[int]]:
        seen.extend(texts)
        return [[ord(letter) for letter in text] for text in texts]

    batches = TextBatches(8, 1, True)
    found = MultipleChoice([Question("a ", ("b", "cd"), 0, "x"), Question("", ("e", "f"), 0, "y")], encode, 1, batches)
    assert seen == ["a", "a b", "a cd", "e", "f"]
    assert [(each.ids, each.start) for each in found._endings] == [
        ([97, 32, 98], 1),
        ([97, 32, 99, 100], 1),
        ([1, 101], 1),
        ([1, 102], 1),
    ]
    with pytest.raises(DataError, match="y: the context is empty"):
        MultipleChoice([Question("", ("e", "f"), 0, "y")], encode, None, batches)
    with pytest.raises(DataError, match=r"x: 9 tokens are more than data\.seq_len = 8"):
        MultipleChoice([Question("a", ("b" * 8, "c"), 0, "x")], encode, None, batches)
    with pytest.raises(DataError, match="the choice 'b' has no token of its own"):
        MultipleChoice([Question("a", ("b", "c"), 0, "x")], lambda texts: [[1] for _ in texts], None, batches)


def test_a_choice_that_shares_a_token_with_its_context_is_named(caplog: pytest.LogCaptureFixture) -> None:
    def encode(texts: list[str]) -> list[list[int]]:
        return [[ord(letter) for letter in text.replace("bc", "\0")] for text in texts]

    found = MultipleChoice([Question("ab", ("cd", "x"), 0, "q.jsonl, line 3")], encode, 1, TextBatches(8, 1, True))
    assert [(each.ids, each.start) for each in found._endings] == [([97, 98, 100], 2), ([97, 98, 120], 2)]
    assert [record.getMessage()[:54] for record in caplog.records] == [
        "q.jsonl, line 3: a token covers the end of the context"
    ]


def test_a_run_scores_questions_in_each_evaluation(folder: Path) -> None:  # noqa: F811
    (folder / "q.jsonl").write_text(json.dumps(ROW) + "\n" + json.dumps({**ROW, "context": "x", "answer": 0}))
    keys = ("data.valid_every=5", "data.multiple_choice={'letters': 'q.jsonl'}", "data.tokenizer_path='tokenizer.json'")
    run_forked(folder, run, 0, keys)
    (path,) = folder.rglob("metrics.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found = [row for row in rows if "val/letters_choice_acc" in row]
    assert [row["step"] for row in found] == [5, 10]
    for row in found:
        assert row["val/letters_choice_acc"] in (0.0, 0.5, 1.0) and row["val/letters_choice_acc_norm"] in (
            0.0,
            0.5,
            1.0,
        )
        assert 0 < row["val/letters_gold_bpb"] < 20


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("data.multiple_choice={'letters': 'q.jsonl'}",), "data.multiple_choice needs data.tokenizer_path"),
        (("data.multiple_choice={'a b': 'q'}", "data.tokenizer_path='tokenizer.json'"), "has the name 'a b'"),
        (("data.multiple_choice={'x': 'none.jsonl'}", "data.tokenizer_path='tokenizer.json'"), "none.jsonl: cannot be"),
    ],
)
def test_what_does_not_work_is_refused(folder: Path, keys: tuple[str, ...], message: str) -> None:  # noqa: F811
    for options in ((), ("--dry-run",)):
        assert message in run_forked(folder, run, 2, ("data.valid_every=5", *keys), *options)
