"""`data.generate_every`: a run shows what its model writes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from helpers.commands import LAUNCHER_VARIABLES, write_config
from helpers.forked import run_forked
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from internlm.cli import main

KEYS = ("data.generate_every=4", "data.generate_prompts=['ab', 'c']", "data.generate_max_new_tokens=5")


def run(code: int, keys: tuple[str, ...], *options: str) -> None:
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    words = [word for key in keys for word in ("--set", key)]
    assert main(["train", "--config", "config.py", *words, *options]) == code


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A config, and a tokenizer of 26 letters beside it."""
    write_config(tmp_path)
    tokenizer = Tokenizer(models.BPE({chr(97 + number): number for number in range(26)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_texts_are_logged_and_written(folder: Path) -> None:
    output = run_forked(folder, run, 0, (*KEYS, "data.tokenizer_path='tokenizer.json'"))
    (path,) = folder.rglob("samples.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["step"], row["prompt"]) for row in rows] == [
        (step, text) for step in (4, 8, 10) for text in ("ab", "c")
    ]
    assert all(len(row["text"]) == 5 and row["text"].isalpha() for row in rows)
    for row in rows:
        assert f"step {row['step']}: {row['prompt']!r} goes on as {row['text']!r}" in output


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (KEYS, "data.generate_every = 4 needs data.tokenizer_path"),
        (("data.generate_every=4", "data.tokenizer_path='tokenizer.json'"), "needs data.generate_prompts"),
        (
            (*KEYS[:2], "data.generate_max_new_tokens=15", "data.tokenizer_path='tokenizer.json'"),
            "data.generate_prompts[0] has 2 tokens, which are with data.generate_max_new_tokens = 15 more than",
        ),
        (
            ("data.generate_every=4", "data.generate_prompts=['']", "data.tokenizer_path='tokenizer.json'"),
            "data.generate_prompts[0] = '' has no token",
        ),
    ],
)
def test_what_does_not_work_is_refused(folder: Path, keys: tuple[str, ...], message: str) -> None:
    for options in ((), ("--dry-run",)):
        assert message in run_forked(folder, run, 2, keys, *options)
