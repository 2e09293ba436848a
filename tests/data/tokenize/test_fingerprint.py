"""The fingerprint follows what a tokenizer does, not how its files are written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from internlm.data.tokenize.fingerprint import tokenizer_fingerprint
from internlm.data.tokenize.text_tokenizer import load_tokenizer
from internlm.data.tokenize.train_bpe import train_bpe

TEXT = "def add(first, second):\n    return first + second\n\n\nprint(add(1, 2))  # three\n"


def fingerprint(path: Path) -> str:
    return tokenizer_fingerprint(load_tokenizer(path))


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bpe")
    train_bpe(iter([TEXT] * 20), 290, folder / "tokenizer.json")
    return folder


def changed(bpe: Path, folder: Path, change) -> Path:
    shutil.copytree(bpe, folder)
    values = json.loads((folder / "tokenizer.json").read_text())
    change(values)
    (folder / "tokenizer.json").write_text(json.dumps(values, indent=1))
    return folder


def test_equal_for_the_same_tokenizer_in_another_form(bpe, tmp_path):
    copy = changed(bpe, tmp_path / "written-anew", lambda values: values.update(truncation=None))
    assert fingerprint(copy) == fingerprint(bpe) == fingerprint(bpe / "tokenizer.json")


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values["model"]["merges"].reverse(),
        lambda values: values.update(normalizer={"type": "NFKC"}),
        lambda values: values["pre_tokenizer"].update(add_prefix_space=True),
        lambda values: values["added_tokens"].append({**values["added_tokens"][0], "id": 290, "content": "<|user|>"}),
        lambda values: values["added_tokens"].pop(),  # the vocabulary keeps it as an ordinary piece
        lambda values: values["model"]["vocab"].update({"zzz": 290}),
    ],
    ids=["merges", "normalizer", "pre-tokenizer", "special token", "no longer special", "vocabulary"],
)
def test_a_different_tokenizer_has_a_different_fingerprint(bpe, tmp_path, change):
    assert fingerprint(changed(bpe, tmp_path / "other", change)) != fingerprint(bpe)


def test_the_fingerprint_covers_eos(bpe, tmp_path):
    other = changed(bpe, tmp_path / "other", lambda values: None)
    config = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "<|pad|>"}))
    assert fingerprint(other) != fingerprint(bpe)
