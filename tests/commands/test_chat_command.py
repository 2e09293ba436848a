"""`internlm chat`: a conversation by the template of the tokenizer."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from commands.test_generate_command import save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from internlm.apis.generation import generate
from internlm.apis.sampling import Sampling
from internlm.checkpoint.load_model import load_model_for_inference
from internlm.cli import main

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("chat"))


def make_folder(folder: Path) -> Path:
    """A tokenizer of bytes with a chat template, and a checkpoint beside it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: id for id, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    save(folder / "run", folder / "tokenizer")
    return folder


def answer(folder: Path, conversation: str) -> str:
    model, _ = load_model_for_inference(folder / "run")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    sampling = Sampling(max_new_tokens=6, num_tokens=256)
    found = generate(model, [tokenizer.encode(conversation).ids], sampling)[0][0]  # type: ignore[arg-type]
    return tokenizer.decode(found.new_ids)


def test_a_conversation_goes_on_and_is_forgotten(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n/reset\none\n"))
    options = ["--greedy", "--max-new-tokens", "6", "--device", "cpu", "--system", "be"]
    assert main(["chat", "--ckpt", str(folder / "run"), *options]) == 0
    first = answer(folder, "[system]be[user]one[a]")
    second = answer(folder, f"[system]be[user]one[assistant]{first}[user]two[a]")
    captured = capsys.readouterr()
    assert captured.out == f"{first}\n{second}\n{first}\n"
    assert "may be longer than the 32 tokens that the model was trained with" in captured.err


def test_a_tokenizer_without_a_template_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer" / "tokenizer.json").read_text())
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    command = ["chat", "--ckpt", str(folder / "run"), "--tokenizer", str(tmp_path), "--device", "cpu"]
    assert main(command) == 2
    assert "the tokenizer has no chat template" in capsys.readouterr().err
