"""Runs that tokenize rows: resuming on other ranks, validation, conversations, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from helpers.chat_templates import save_chat_tokenizer
from helpers.commands import metrics_of, start_ranks, start_training, write_config
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

TEXTS = [f"What is the sum of {number} and three? " * (1 + number % 5) for number in range(120)]
CHATS = [
    {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "The answer is five."}]}
    for text in TEXTS
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user_cache"))
    save_chat_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "rows" / "data").mkdir(parents=True)
    table = pyarrow.table({"story": TEXTS})
    pyarrow.parquet.write_table(table, tmp_path / "rows" / "data" / "train-00000-of-00001.parquet", row_group_size=20)
    pyarrow.parquet.write_table(table[:30], tmp_path / "rows" / "data" / "validation-00000-of-00001.parquet")
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    return tmp_path


def keys_of(folder: Path, **more: Any) -> dict[str, Any]:
    keys = {
        "type": "streaming",
        "train_folder": str(folder / "rows"),
        "tokenizer_path": str(folder / "tokenizer"),
        "content_name": "story",
        "min_length": 4,
        "min_length_dict": None,
        "valid_folder": None,
        "valid_every": 0,
        "num_worker": 1,
        "gradient_accumulation": None,
        "micro_num": 4,
    }
    return keys | more


def train(folder: Path, data: dict[str, Any], *arguments: object, run: str = "run", ranks: int = 1) -> Any:
    """(exit code, output, lines of the metrics)."""
    config = write_config(folder, f"data.update({data!r})\nmodel['vocab_size'] = 640\n")
    options = ["--config", config, "--run-dir", folder / run, *arguments]
    if ranks == 1:
        commands = [start_training(options, folder / f"{run}.txt")]
    else:
        (folder / f"ranks-{run}").mkdir()
        commands = start_ranks(options, folder / f"ranks-{run}", ranks)
    code = max(command.wait() for command in commands)
    lines = [] if code or "--dry-run" in arguments else metrics_of(folder / run)
    return code, commands[0].output, lines


def values(lines: list[Any], name: str) -> list[float]:
    return [line[name] for line in lines if name in line]


def test_a_run_resumes_on_other_ranks(folder: Path) -> None:
    code, output, straight = train(folder, keys_of(folder, total_steps=8), "--set", "ckpt.enable_save_ckpt=False")
    assert code == 0, output
    assert "split 'train' is 1 parquet file" in output
    code, output, first = train(folder, keys_of(folder, total_steps=5), run="first")
    assert code == 0, output
    code, output, second = train(folder, keys_of(folder, total_steps=8, micro_num=2), run="second", ranks=2)
    assert code == 0 and "resuming at step 5" in output, output
    assert "order of samples differs" not in output and "beginning" not in output
    losses = values(first, "loss") + values(second, "loss")
    assert losses == pytest.approx(values(straight, "loss"), rel=1e-4)
    assert len(set(losses)) == 8


def test_the_split_validation_is_evaluated(folder: Path) -> None:
    keys = keys_of(folder, total_steps=4, valid_folder=str(folder / "rows"), valid_every=2)
    code, output, _ = train(folder, keys)
    assert code == 0, output
    assert "validation set 'rows': 30 documents" in output and "val/rows_loss" in output


def test_rows_that_are_trained_on_are_not_the_validation_set(folder: Path) -> None:
    (folder / "rows" / "data" / "validation-00000-of-00001.parquet").unlink()
    # The same folder under another name.
    keys = keys_of(folder, valid_folder=str(folder / "rows" / "data" / ".."), valid_every=2)
    code, output, _ = train(folder, keys, "--dry-run")
    assert code == 2 and "data.valid_folder is data.train_folder, whose rows are trained on" in output, output


def test_conversations(folder: Path) -> None:
    keys = keys_of(folder, total_steps=4, train_folder=str(folder / "chats.jsonl"), content_name="text")
    code, output, lines = train(folder, keys | {"conversations": {}})
    assert code == 0 and len(values(lines, "loss")) == 4, output
    code, output, _ = train(folder, keys | {"content_name": "messages"}, "--dry-run")
    assert code == 2 and "'messages' is list, not text" in output


def test_a_dry_run_encodes_rows(folder: Path) -> None:
    code, output, _ = train(folder, keys_of(folder), "--dry-run")
    assert code == 0 and "120 rows, of which 120 were read" in output, output
    code, output, _ = train(folder, keys_of(folder, content_name="text"), "--dry-run")
    assert code == 2 and "has no column 'text'; its columns are ['story']" in output, output
    code, output, _ = train(folder, keys_of(folder, min_length=30), "--dry-run")
    assert code == 0 and " 0 rows have none, 48 fewer than data.min_length, 0 are unreadable" in output, output
    code, output, _ = train(folder, keys_of(folder, min_length=5000), "--dry-run")
    assert code == 2 and "none of 120 rows that were read has data.min_length tokens; the longest" in output, output
    code, output, _ = train(folder, keys_of(folder, train_folder=str(folder / "none")), "--dry-run")
    assert code == 2 and str(folder / "none") in output, output
    code, output, _ = train(folder, keys_of(folder, tokenizer_path=str(folder / "rows")), "--dry-run")
    assert code == 2 and "tokenizer" in output, output


def test_a_tokenizer_without_eos_is_named(folder: Path) -> None:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(TEXTS, BpeTrainer(vocab_size=300, show_progress=False))
    tokenizer.save(str(folder / "bare.json"))
    keys = keys_of(folder, tokenizer_path=str(folder / "bare.json"))
    code, output, _ = train(folder, keys, "--dry-run")
    assert code == 0 and "names no eos token, so documents have no end mark" in output, output
    code, output, _ = train(folder, keys | {"add_eos": False}, "--dry-run")
    assert code == 0 and "eos token" not in output, output
    code, output, _ = train(folder, keys | {"add_eos": True}, "--dry-run")
    assert code == 2 and "names no eos token; remove data.add_eos" in output, output


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"tokenizer_path": None}, "data.type = 'streaming' needs data.tokenizer_path"),
        ({"train_folder": None}, "data.type = 'streaming' needs data.train_folder"),
        ({"conversations": {}}, "data.content_name has no meaning with data.conversations"),
        ({"type": "tokenized"}, "data.content_name needs data.type = 'streaming'"),
    ],
)
def test_contradictions_are_refused(folder: Path, keys: dict[str, Any], message: str) -> None:
    code, output, _ = train(folder, keys_of(folder, **keys), "--dry-run")
    assert code == 2 and message in output, output
