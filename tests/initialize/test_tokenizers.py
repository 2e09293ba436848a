"""Which tokenizer made the data: compared with the config's and the checkpoint's, kept with every checkpoint."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.configs import small_config
from helpers.hf_folders import save_native
from helpers.model import tiny_model

from internlm.checkpoint.data_tokenizer import KnownTokenizer, trained_with
from internlm.checkpoint.save_folder import resolve
from internlm.cli import main
from internlm.config.loader import load_config
from internlm.config.schema import Config
from internlm.convert.from_hf import convert_from_hf
from internlm.convert.to_hf import convert_to_hf
from internlm.core.context.parallel_context import ParallelContext
from internlm.data.tokenize.fingerprint import tokenizer_fingerprint
from internlm.data.tokenize.pipeline import TokenizeOptions, tokenize
from internlm.data.tokenize.text_tokenizer import load_tokenizer
from internlm.data.tokenize.train_bpe import train_bpe
from internlm.initialize.build import build_layout, build_trainer
from internlm.initialize.tokenizers import compare_with_checkpoint, data_tokenizer
from internlm.utils.errors import CheckpointError, ConfigError, DataError
from internlm.utils.storage import storage_path

TEXTS = ["the model reads the text and the code", "def add(first, second):\n    return first + second"] * 20
VOCAB = 280


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizers a and b, of the same size and with other ids, and tokenized files by each."""
    folder = tmp_path_factory.mktemp("places")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    for name, texts in (("a", TEXTS), ("b", [text[::-1] for text in TEXTS])):
        train_bpe(texts, VOCAB, folder / name / "tokenizer.json")
        output = folder / f"data_{name}" / "en" / "x.bin"
        tokenize(TokenizeOptions((str(folder / "text.jsonl"),), output, folder / name, processes=1))
    return folder


def config_of(places: Path, data: str = "data_a", **changes: Any) -> Config:
    keys = {"data.train_folder": str(places / data), "model.vocab_size": VOCAB}
    return small_config({**keys, **{key.replace("__", "."): value for key, value in changes.items()}})


def known(places: Path, name: str) -> KnownTokenizer:
    tokenizer = load_tokenizer(places / name)
    return KnownTokenizer(tokenizer_fingerprint(tokenizer), str(places / name), tokenizer.vocab_size)


def test_the_data_and_the_config_name_one_tokenizer(places: Path) -> None:
    assert data_tokenizer(small_config({})) is None
    for path in (None, str(places / "a"), str(places / "a" / "tokenizer.json")):
        found = data_tokenizer(config_of(places, data__tokenizer_path=path))
        assert found is not None and found.fingerprint == known(places, "a").fingerprint


def test_another_tokenizer_than_the_datas(
    places: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("internlm"), "propagate", True)
    caplog.set_level(logging.INFO, "internlm")
    path = str(places / "b")
    with pytest.raises(ConfigError, match=r"data\.tokenizer_path differs from that of the data: .*check_tokenizer"):
        data_tokenizer(config_of(places, data__tokenizer_path=path))
    data_tokenizer(config_of(places, data__tokenizer_path=path, data__check_tokenizer=False))
    assert "data.tokenizer_path differs from that of the data" in caplog.text


def test_data_of_several_tokenizers(places: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(places / f"data_{name}" / "en", tmp_path / name)
    with pytest.raises(DataError, match=r"made by different tokenizers.*data\.check_tokenizer = False"):
        data_tokenizer(config_of(tmp_path, "."))
    assert data_tokenizer(config_of(tmp_path, ".", data__check_tokenizer=False)) is None
    valid = {"data__valid_folder": str(places / "data_b"), "data__valid_every": 1}
    with pytest.raises(DataError, match="made by different tokenizers"):
        data_tokenizer(config_of(places, **valid))


@pytest.mark.parametrize("data", ["data_a", None])
def test_more_ids_than_the_model_has(places: Path, data: str | None) -> None:
    changes = {"data.train_folder": None if data is None else str(places / data), "model.vocab_size": 64}
    with pytest.raises(ConfigError, match=r"the tokenizer has 280 ids, model\.vocab_size is only 64"):
        data_tokenizer(small_config({**changes, "data.tokenizer_path": str(places / "a")}))


def test_a_tokenizer_that_cannot_be_read_is_told(
    places: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("internlm"), "propagate", True)
    caplog.set_level(logging.INFO, "internlm")
    data_tokenizer(config_of(places, data__tokenizer_path=str(places / "gone")))
    assert "is not compared with that of the data" in caplog.text


def test_the_checkpoint_a_run_starts_from(places: Path, tmp_path: Path) -> None:
    """One of ours says what it was trained on; an imported one, and a folder of Hugging Face, have their tokenizer."""
    ours, imported, theirs = tmp_path / "ours", tmp_path / "imported", tmp_path / "theirs"
    ours.mkdir()
    (ours / "data_tokenizer.json").write_text(known(places, "a").to_json())
    shutil.copytree(places / "a", imported / "hf")
    (imported / "hf" / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    shutil.copytree(imported / "hf", theirs)
    config = config_of(places)
    for folder in (ours, imported, theirs):
        files = compare_with_checkpoint(config, storage_path(folder), known(places, "a"))
        assert KnownTokenizer.from_json(files["data_tokenizer.json"]).fingerprint == known(places, "a").fingerprint
        assert ("hf/generation_config.json" in files) == (folder is not ours)
        with pytest.raises(
            ConfigError, match=f"the tokenizer of the checkpoint '{folder}' differs from that of the data"
        ):
            compare_with_checkpoint(config, storage_path(folder), known(places, "b"))
    # Data that does not say goes on with what the checkpoint says.
    files = compare_with_checkpoint(config, storage_path(ours), None)
    assert files == {"data_tokenizer.json": known(places, "a").to_json()}
    # Another end of text is no other ids: a chat model goes on from a base model.
    chat = tmp_path / "chat"
    shutil.copytree(places / "a", chat)
    values = json.loads((chat / "tokenizer_config.json").read_text())
    (chat / "tokenizer_config.json").write_text(json.dumps({**values, "eos_token": "<|pad|>"}))
    compare_with_checkpoint(config, storage_path(ours), known(tmp_path, "chat"))


def test_from_import_to_export(places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tokens that end a text go along through import, training, generation and export, and so does the tokenizer."""
    save_native("llama", tmp_path / "theirs")
    for file in (places / "a").iterdir():
        shutil.copy(file, tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    (tmp_path / "theirs" / "generation_config.json").write_text('{"eos_token_id": [7, 8], "pad_token_id": 0}')
    model = tiny_model("LLAMA2", vocab_size=VOCAB, num_kv_attention_heads=2)
    from safetensors.torch import save_file

    from internlm.model.huggingface.weight_names import to_hf

    for path in (tmp_path / "theirs").glob("model*"):
        path.unlink()
    save_file(to_hf(model.state_dict(), model.architecture), tmp_path / "theirs" / "model.safetensors")
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({**config, "vocab_size": VOCAB}))
    imported = convert_from_hf(storage_path(tmp_path / "theirs"), storage_path(tmp_path / "imported"))
    text = tmp_path / "run.py"
    section = json.loads((tmp_path / "imported" / "0" / "config.json").read_text())["model"]
    keys = {key: value for key, value in section.items() if key in _KEPT}
    text.write_text(
        f"JOB_NAME = 'tune'\nmodel_type = 'LLAMA2'\nmodel = dict(**{keys!r})\n"
        f"data = dict(seq_len=16, micro_bsz=2, total_steps=1, num_worker=0, train_folder={str(places / 'data_a')!r},\n"
        f"            tokenizer_path={str(places / 'a')!r})\n"
        f"ckpt = dict(save_ckpt_folder={str(tmp_path / 'saved')!r}, checkpoint_every=1,\n"
        f"            load_ckpt_info=dict(path={str(imported)!r}, content=('model',)))\n"
    )
    loaded = load_config(text)
    context = ParallelContext.create(build_layout(loaded.config, 1))
    build_trainer(loaded.config, context, tmp_path / "run").fit()
    saved = resolve(storage_path(tmp_path / "saved"))
    assert trained_with(saved) == data_tokenizer(loaded.config)
    # Its own end of text comes first, then those of the model it was trained on from.
    convert_to_hf(saved, storage_path(tmp_path / "out"))
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [1, 7, 8], "pad_token_id": 0}
    with pytest.raises(CheckpointError, match=r"trained on the ids of another tokenizer.*--no-tokenizer"):
        convert_to_hf(saved, storage_path(tmp_path / "out2"), tokenizer=storage_path(places / "b"))
    command = ["generate", "--ckpt", str(saved), "--prompt", "the", "--max-new-tokens", "2", "--greedy"]
    assert main(command) == 0
    capsys.readouterr()
    assert main([*command, "--tokenizer", str(places / "b")]) == 2
    assert "was trained on the ids of another tokenizer" in capsys.readouterr().err
    assert main([*command, "--tokenizer", str(places / "b"), "--other-tokenizer"]) == 0


_KEPT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_attention_heads",
    "num_kv_attention_heads",
    "max_position_embeddings",
    "dtype",
)


def test_a_dry_run_compares_them_too(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.py").write_text(
        "JOB_NAME = 'dry'\nmodel = dict(vocab_size=64, hidden_size=32, num_layers=1, num_attention_heads=4)\n"
        f"data = dict(seq_len=16, micro_bsz=1, total_steps=1, train_folder={str(places / 'data_a')!r})\n"
        "ckpt = dict(enable_save_ckpt=False)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config", "config.py", "--dry-run"]) == 2
    assert "the tokenizer has 280 ids, model.vocab_size is only 64" in capsys.readouterr().err
