"""`internlm convert` from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.hf_folders import assert_same_tensors, load_native, save_native, save_published, tensors_of
from helpers.pages import ROOT

from internlm.cli import main
from internlm.commands.convert import parse_size
from internlm.utils.errors import ConfigError


def test_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_native("qwen2", tmp_path / "theirs")
    assert main(["convert", "from-hf", "--hf", str(tmp_path / "theirs"), "--out", str(tmp_path / "ours")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/ours/0\n"
    back = ["--ckpt", str(tmp_path / "ours"), "--out", str(tmp_path / "back"), "--max-shard-size", "40KB"]
    assert main(["convert", "to-hf", *back, "--dtype", "fp32"]) == 0
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    assert_same_tensors(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "theirs"))


def test_layouts(tmp_path: Path) -> None:
    save_published("internlm2", tmp_path / "theirs")
    (tmp_path / "theirs" / "modeling_internlm2.py").write_text("# code")
    (tmp_path / "theirs" / "tokenization_internlm2.py").write_text("# code")
    assert main(["convert", "from-hf", "--hf", str(tmp_path / "theirs"), "--out", str(tmp_path / "ours")]) == 0
    for layout, kind, code in (("published", "internlm2", 2), ("transformers", "llama", 1)):
        out = tmp_path / layout
        assert main(["convert", "to-hf", "--ckpt", str(tmp_path / "ours"), "--out", str(out), "--layout", layout]) == 0
        assert json.loads((out / "config.json").read_text())["model_type"] == kind
        assert len(list(out.glob("*.py"))) == code
    load_native(tmp_path / "transformers")


def test_files_beside_the_weights_come_along(tmp_path: Path) -> None:
    """There and back: tokenizer, generation config, licence; weights and their index are written anew."""
    save_native("llama", tmp_path / "theirs")
    kept = {
        "tokenizer.json": "{}",
        "tokenizer_config.json": '{"a": 1}',
        "merges.txt": "a b",
        "chat_template.jinja": "{{ messages }}",
        "generation_config.json": '{"eos_token_id": [2, 5]}',
        "LICENSE": "free",
    }
    for name, text in kept.items():
        (tmp_path / "theirs" / name).write_text(text)
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({**config, "eos_token_id": [2, 5], "pad_token_id": 3}))
    assert main(["convert", "from-hf", "--hf", str(tmp_path / "theirs"), "--out", str(tmp_path / "ours")]) == 0
    assert main(["convert", "to-hf", "--ckpt", str(tmp_path / "ours"), "--out", str(tmp_path / "back")]) == 0
    assert {path.name for path in (tmp_path / "back").iterdir()} == {
        *kept,
        "README.md",
        "config.json",
        "model.safetensors",
    }
    for name, text in kept.items():
        assert (tmp_path / "back" / name).read_text() == text
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (back["bos_token_id"], back["eos_token_id"], back["pad_token_id"]) == (1, [2, 5], 3)


def test_mistakes_are_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "from-hf", "--hf", str(tmp_path / "no"), "--out", str(tmp_path / "ours")]) == 2
    assert capsys.readouterr().err == f"error: there is no Hugging Face folder at '{tmp_path}/no'\n"
    assert main(["convert", "to-hf", "--ckpt", str(tmp_path / "no"), "--out", str(tmp_path / "hf")]) == 2
    assert "error: there is no checkpoint at" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 << 19), ("200kb", 200_000), ("7B", 7)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5", "GB", "0GB", "-1GB", "5XB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is not a size; write it as 5GB"):
        parse_size(text)


@pytest.mark.parametrize("tool", ["convert_to_hf.py", "convert_from_hf.py"])
def test_the_scripts_are_the_command(tool: str, tmp_path: Path) -> None:
    asked = subprocess.run(
        [sys.executable, ROOT / "tools" / tool, "--help"], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert asked.stdout.startswith(f"usage: internlm convert {tool[8:-3].replace('_', '-')} [-h]")
