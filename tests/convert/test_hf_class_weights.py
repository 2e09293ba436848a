"""Weights of classes of transformers: from a folder into a run, into a checkpoint, and back to a folder, bit by bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.hf_classes import tiny_class
from safetensors.torch import save_file
from torch import nn

from internlm.cli import main
from internlm.config.hf_class import filled_model_section
from internlm.config.schema import ModelConfig
from internlm.convert.hf_class_weights import HfClassWeights
from internlm.convert.hf_folder import HfFolder
from internlm.model.hf_class.model import HfClassModel
from internlm.utils.errors import CheckpointError
from internlm.utils.logging import ROOT_LOGGER
from internlm.utils.storage import storage_path

transformers = pytest.importorskip("transformers")

CONFIG = """
model_type = "hf"
hf = dict(folder="{folder}")
model = dict(dtype="torch.float32")
data = dict(seq_len=32, micro_bsz=2, micro_num=1, total_steps=1)
adam = dict(lr={lr})
lr_scheduler = dict(warmup_ratio=0.0, eta_min={lr})
ckpt = dict(
    save_ckpt_folder="{save}",
    checkpoint_every=1,
    load_ckpt_info=dict(path="{folder}", content=("model",), ckpt_type="hf"),
)
tensorboard_folder = "{save}/tb"
monitor = dict(metrics_file=False)
enable_tb = False
"""


def train(folder: Path, tmp_path: Path, lr: float, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.py").write_text(CONFIG.format(folder=folder, save=tmp_path / "saved", lr=lr))
    return main(["train", "--config", str(tmp_path / "config.py")])


def saved(family: str, folder: Path) -> nn.Module:
    model = tiny_class(family)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "phi", "gpt_oss", "mixtral", "qwen3_moe"])
def test_a_run_starts_from_a_folder_and_ends_in_one(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = saved(family, tmp_path / "class")
    # A step with a learning rate of 0 leaves every weight as it was loaded.
    assert train(tmp_path / "class", tmp_path, 0.0, monkeypatch) == 0
    out = tmp_path / "out"
    assert main(["convert", "to-hf", "--ckpt", str(tmp_path / "saved"), "--out", str(out), "--check"]) == 0
    card = (out / "README.md").read_text()
    assert "| logits in float32 | passed |" in card and "| steps | 1 of 1 |" in card
    assert "| tokens, padding included | 64 |" in card
    model, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, dtype=torch.float32)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model) is type(original)
    for (name, ours), theirs in zip(model.named_parameters(), original.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_experts_in_files_of_their_own_become_one_tensor(tmp_path: Path) -> None:
    """12 of them: they are stacked by number, not by name. The tensors in memory are transformers' own."""
    original = tiny_class("mixtral", num_experts=12, num_local_experts=12)
    original.save_pretrained(tmp_path)
    folder = HfFolder(storage_path(tmp_path))
    assert "model.layers.0.block_sparse_moe.experts.10.w1.weight" in folder.entries
    values = filled_model_section({"folder": str(tmp_path)}, {"dtype": "torch.float32"})
    with torch.device("meta"):
        model = HfClassModel(ModelConfig.model_validate(values))
    weights = HfClassWeights(folder, model)
    state = dict(original.named_parameters())
    assert set(weights.names()) == state.keys()
    for name, parameter in state.items():
        assert weights.shape(name) == parameter.shape
        assert torch.equal(weights.read(name), parameter), name


def test_a_folder_with_other_sizes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saved("qwen3", tmp_path / "class")
    tiny_class("qwen3", num_hidden_layers=2).save_pretrained(tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    text = CONFIG.format(folder=tmp_path / "class", save=tmp_path / "saved", lr=0.0)
    loaded = text.replace(f'path="{tmp_path / "class"}"', f'path="{tmp_path / "other"}"')
    (tmp_path / "config.py").write_text(loaded)
    with caplog.at_level("ERROR", logger=ROOT_LOGGER):
        assert main(["train", "--config", str(tmp_path / "config.py"), "--dry-run"]) != 0


@pytest.mark.parametrize("difference", [0.0, 1.0])
def test_a_second_copy_of_a_tied_head_is_dropped_if_it_is_one(difference: float, tmp_path: Path) -> None:
    original = tiny_class("llama", tie_word_embeddings=True)
    original.save_pretrained(tmp_path)
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    state = {name: parameter.detach() for name, parameter in original.named_parameters()}
    save_file({**state, head: state[embedding] + difference}, tmp_path / "model.safetensors")
    values = filled_model_section({"folder": str(tmp_path)}, {"dtype": "torch.float32"})
    with torch.device("meta"):
        model = HfClassModel(ModelConfig.model_validate(values))
    folder = HfFolder(storage_path(tmp_path))
    if difference:
        with pytest.raises(CheckpointError, match=f"ties '{head}' to '{embedding}', but it"):
            HfClassWeights(folder, model)
    else:
        assert set(HfClassWeights(folder, model).names()) == state.keys()
