"""The tokenizer beside exported weights: transformers gives the ids that the model was trained on, or it is refused."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from helpers.sentencepieces import AS_T5, train_sentencepiece

from internlm.convert.sentencepiece_json import sentencepiece_json
from internlm.convert.tokenizer_files import equivalent_files, tokenizer_files
from internlm.data.tokenize.probes import PROBE_TEXTS
from internlm.data.tokenize.text_tokenizer import load_tokenizer
from internlm.data.tokenize.train_bpe import train_bpe
from internlm.utils.errors import CheckpointError
from internlm.utils.storage import storage_path

CONFIG = {"model_type": "llama", "vocab_size": 512}


def export(path: Path, out: Path, **config: Any) -> Any:
    """Write what would lie beside the weights; returns transformers' tokenizer."""
    out.mkdir()
    for name, data in equivalent_files(
        tokenizer_files(storage_path(path)), {**CONFIG, **config}, with_code=False
    ).items():
        (out / name).write_bytes(data)
    (out / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return transformers.AutoTokenizer.from_pretrained(out)


def assert_same_ids(theirs: Any, path: Path) -> None:
    ours = load_tokenizer(path)
    assert theirs(list(PROBE_TEXTS), add_special_tokens=False)["input_ids"] == ours.encode_batch(list(PROBE_TEXTS))
    assert theirs.eos_token_id == ours.eos_id


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_sentencepiece(tmp_path_factory.mktemp("sp") / "own.model")


@pytest.mark.parametrize(
    "options",
    [{}, {"model_type": "unigram"}, AS_T5, {"add_dummy_prefix": False}],
    ids=["llama", "unigram", "t5", "bare"],
)
def test_a_sentencepiece_model_is_served_with_its_own_ids(tmp_path: Path, options: dict[str, Any]) -> None:
    path = train_sentencepiece(tmp_path / "own.model", **options)
    theirs = export(path, tmp_path / "out")
    assert_same_ids(theirs, path)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == path.read_bytes()
    for text in ("the model reads  code", "a return"):
        assert theirs.decode(theirs(text, add_special_tokens=False)["input_ids"]) == load_tokenizer(path).decode(
            load_tokenizer(path).encode_batch([text])[0]
        )


def test_a_folder_with_special_tokens(tmp_path: Path, model_file: Path) -> None:
    size = load_tokenizer(model_file).vocab_size
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(model_file, folder / "tokenizer.model")
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "bos_token": "<s>",
        "eos_token": "<|end|>",
        "chat_template": "{{ messages }}",
        "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]},
        "added_tokens_decoder": {
            "5": {"content": "<|user|>", "special": True},
            str(size + 1): {"content": "<|end|>", "special": True},
            str(size): {"content": "<tool>"},
        },
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenization_own.py").write_text("raise AssertionError('code of the folder was run')")
    theirs = export(folder, tmp_path / "out")
    assert_same_ids(theirs, folder)
    text = "<|user|>the  model<tool> the\n    return<|end|>"
    ids = load_tokenizer(folder).encode_batch([text])[0]
    assert theirs(text)["input_ids"] == [1, *ids] and ids[0] == 5 and ids[-1] == size + 1 and size in ids
    assert theirs.chat_template == "{{ messages }}"
    assert theirs.decode([5, size, size + 1], skip_special_tokens=True) == "<tool>"
    assert not (tmp_path / "out" / "tokenization_own.py").exists()


def test_what_transformers_builds_anew_is_written_so_that_it_does_not(
    tmp_path: Path, model_file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its Llama class makes a tokenizer of its own out of a tokenizer.json, which splits otherwise."""
    monkeypatch.setattr(logging.getLogger("internlm"), "propagate", True)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(sentencepiece_json(model_file, {}, (None, None)))
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = export(tmp_path / "folder", tmp_path / "out")
    assert_same_ids(theirs, tmp_path / "folder")
    assert "transformers would give other ids than the training data has: " in caplog.text


def test_a_tokenizer_that_agrees_is_copied(tmp_path: Path) -> None:
    train_bpe(["the model reads  the code\n    return\n"] * 3, 280, tmp_path / "folder" / "tokenizer.json")
    assert_same_ids(export(tmp_path / "folder", tmp_path / "out"), tmp_path / "folder")
    for path in (tmp_path / "folder").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_what_cannot_be_equivalent_files_is_refused(tmp_path: Path) -> None:
    # A piece of the user's own, behind which SentencePiece puts no space before the text.
    path = train_sentencepiece(tmp_path / "own.model", user_defined_symbols=["return"])
    with pytest.raises(CheckpointError, match=r"other ids than it was trained on: .*return.* --no-tokenizer"):
        export(path, tmp_path / "out")


def test_more_tokens_than_the_model_has(tmp_path: Path, model_file: Path) -> None:
    with pytest.raises(CheckpointError, match=r"the tokenizer has \d+ tokens, the model only 100"):
        export(model_file, tmp_path / "out", vocab_size=100)
