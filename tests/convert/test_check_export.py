"""`internlm convert to-hf --check`: it passes for every kind of model, and sees what conversions get wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.hf_folders import SIZES, save_native
from helpers.llava import CLIP
from helpers.tiny_checkpoints import save
from safetensors.torch import load_file, save_file
from torch import Tensor

from internlm.cli import main
from internlm.convert.check_export import check_export
from internlm.convert.findings import Finding
from internlm.convert.from_hf import convert_from_hf
from internlm.convert.to_hf import convert_to_hf
from internlm.data.tokenize.text_tokenizer import load_tokenizer
from internlm.data.tokenize.train_bpe import train_bpe
from internlm.utils.storage import storage_path

GQA = {"num_kv_attention_heads": 2}


def check(tmp_path: Path, *options: str) -> int:
    """Export `ours` to `out` with --check."""
    return main(["convert", "to-hf", "--ckpt", f"{tmp_path}/ours", "--out", f"{tmp_path}/out", "--check", *options])


@pytest.mark.parametrize("name", ["llama3", "qwen2-tied-window", "gemma", "gpt-oss", "deepseek-v3"])
def test_families_pass(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    save_native(name, tmp_path / "theirs", torch.bfloat16)
    convert_from_hf(storage_path(tmp_path / "theirs"), storage_path(tmp_path / "ours"))
    assert check(tmp_path) == 0
    printed = capsys.readouterr().out
    assert "logits in float32: passed: largest difference" in printed and "logits in bfloat16: passed" in printed
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| logits in float32 | passed |" in card and "| tokenizer | not checked |" in card


def test_rounded_weights_are_compared_as_rounded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "ours", "INTERNLM2", **GQA, norm_head=True, qk_interleaved=True)
    assert check(tmp_path, "--dtype", "bf16") == 0
    assert "logits in bfloat16: passed" in capsys.readouterr().out


def test_a_model_that_reads_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tower, text = transformers.CLIPVisionConfig(**CLIP), transformers.LlamaConfig(**SIZES)
    config = transformers.LlavaConfig(vision_config=tower, text_config=text, image_token_index=63, image_seq_length=4)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "theirs")
    convert_from_hf(storage_path(tmp_path / "theirs"), storage_path(tmp_path / "ours"))
    assert check(tmp_path) == 0
    assert "pictures: not checked" in capsys.readouterr().out


def test_what_is_beyond_the_sequences_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "ours", "MISTRAL", sliding_window=1000, max_position_embeddings=4096)
    assert check(tmp_path) == 0
    assert "a window of 1,000 tokens: not checked: it acts beyond 1,000 tokens" in capsys.readouterr().out


def test_what_cannot_be_checked_is_refused_before_the_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "ours", "INTERNLM2")
    assert check(tmp_path, "--layout", "published") == 2
    assert "the code of published checkpoints is not run" in capsys.readouterr().err
    monkeypatch.setattr("internlm.convert.check_export.why_unusable", lambda name: f"{name} is not installed")
    assert check(tmp_path) == 2
    assert "transformers is not installed; pip install transformers" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# -- what goes wrong in conversions ------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with more rows than its tokenizer has tokens; `ours`, `out` and `tokenizer`."""
    folder = tmp_path_factory.mktemp("exported")
    train_bpe(["the model reads  the code\n    return\n"] * 3, 280, folder / "tokenizer" / "tokenizer.json")
    save(folder / "ours", "LLAMA2", **GQA, vocab_size=300)
    convert_to_hf(
        storage_path(folder / "ours"), storage_path(folder / "out"), tokenizer=storage_path(folder / "tokenizer")
    )
    return folder


def findings(exported: Path, folder: Path) -> dict[str, Finding]:
    tokenizer = load_tokenizer(exported / "tokenizer")
    found = check_export(storage_path(exported / "ours" / "0"), folder, tokenizer)
    return {finding.subject: finding for finding in found}


def test_the_export_as_it_is(exported: Path) -> None:
    found = findings(exported, exported / "out")
    assert [found[name].outcome for name in ("logits in float32", "tokenizer")] == ["passed", "passed"]
    assert "the embedding has 20 more rows than it has tokens" in found["tokenizer"].text
    assert found["chat template"].text.startswith("there is none")


def permuted(tensors: dict[str, Tensor]) -> None:
    """Adjacent rotary pairs instead of halves: what gives garbled text."""
    for name in [name for name in tensors if "q_proj" in name or "k_proj" in name]:
        tensor = tensors[name]
        tensors[name] = tensor.unflatten(0, (-1, 2, 4)).transpose(1, 2).reshape(tensor.shape).contiguous()


def swapped(tensors: dict[str, Tensor]) -> None:
    name = "model.layers.0.mlp.{}_proj.weight"
    gate, up = name.format("gate"), name.format("up")
    tensors[gate], tensors[up] = tensors[up], tensors[gate]


def without_norm(tensors: dict[str, Tensor]) -> None:
    del tensors["model.norm.weight"]


@pytest.mark.parametrize(
    ("change", "keys", "expected"),
    [
        (permuted, {}, "the order of the rotary pairs of q and k"),
        (swapped, {}, "already the first token differs"),
        (without_norm, {}, "transformers cannot compute them: missing keys: model.norm.weight"),
        (None, {"rope_parameters": {"rope_type": "default", "rope_theta": 9e3}}, "at the rotary keys of config.json"),
        (None, {"rms_norm_eps": 1e-4}, "look at config.json (norm epsilon"),
    ],
)
def test_wrong_logits_are_found(
    exported: Path,
    tmp_path: Path,
    change: Callable[[dict[str, Tensor]], None] | None,
    keys: dict[str, Any],
    expected: str,
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(exported / "out", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))
    if change is not None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    found = findings(exported, folder)["logits in float32"]
    assert found.outcome == "failed" and expected in str(found)


def test_wrong_ids_are_found(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(exported / "out", folder)
    values = json.loads((folder / "tokenizer.json").read_text())
    ids = values["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    (folder / "tokenizer.json").write_text(json.dumps(values))
    found = findings(exported, folder)["tokenizer"]
    assert found.outcome == "failed" and "in training and" in found.text


def test_a_failed_check_is_the_exit_code_and_in_the_card(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "ours", "LLAMA2")
    monkeypatch.setattr("internlm.convert.compare_logits.ROUNDING_FACTOR", -1e9)
    assert check(tmp_path) == 1
    assert "logits in float32: failed: " in capsys.readouterr().out
    assert "| logits in float32 | failed |" in (tmp_path / "out" / "README.md").read_text()
