"""Checkpoints of ours as Hugging Face folders: the same function, the right names, and what lies beside the weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.hf_folders import assert_same_logits, assert_same_tensors, load_native, random_tokens, tensors_of
from helpers.model import tiny_model
from helpers.pages import ROOT
from helpers.tiny_checkpoints import save, write

from internlm.config.schema import Config
from internlm.convert.to_hf import check_exportable, convert_to_hf, export_next_to
from internlm.model.huggingface.to_config import weight_layout
from internlm.model.huggingface.weight_names import to_hf
from internlm.utils.errors import CheckpointError, ConfigError
from internlm.utils.storage import storage_path

GQA = {"num_kv_attention_heads": 2}
FUSED = {"enable_qkv_fusion": True, "mlp_layer_fusion": True}
EXPERTS = {"num_experts": 5, "top_k": 2, "moe_type": "Dropless", "intermediate_size": 24}
APART = {"enable_qkv_fusion": False, "mlp_layer_fusion": False}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    # name: (model_type, keys)
    "internlm": ("INTERNLM", {}),
    "internlm-apart-interleaved": ("INTERNLM", {**APART, "qk_interleaved": True}),
    "internlm2": ("INTERNLM2", GQA),
    "internlm2-interleaved": ("INTERNLM2", {**GQA, **FUSED, "qk_interleaved": True}),
    "internlm2-norm-head": ("INTERNLM2", {**GQA, "norm_head": True}),
    "internlm3": ("INTERNLM3", GQA),
    "llama2": ("LLAMA2", {**FUSED, "mlp_bias": True, "no_bias": False}),
    "llama3": ("LLAMA3", {**GQA, "tie_word_embeddings": True, "rope_scaling": {"type": "llama3", "factor": 8.0}}),
    "mistral": ("MISTRAL", {**GQA, "sliding_window": 7}),
    "qwen2": ("QWEN2", {**GQA, **FUSED, "qk_interleaved": True}),
    "qwen3": ("QWEN3", {**GQA, "head_dim": 10, **FUSED, "qk_interleaved": True}),
    "gemma": ("GEMMA", {"num_kv_attention_heads": 1, "head_dim": 12}),
    "gemma-untied": ("GEMMA", {"tie_word_embeddings": False}),
    "baichuan2": ("BAICHUAN2", {}),
    "mixtral": ("MIXTRALMOE", {**GQA, **EXPERTS, "qk_interleaved": True}),
    "internlm-moe-no-biases": ("INTERNLM_MoE", {**EXPERTS, "no_bias": True}),
    "qwen2-moe": ("QWEN2MOE", {**GQA, **EXPERTS, **FUSED, "num_shared_experts": 2}),
    "qwen3-moe": ("QWEN3MOE", {**GQA, **EXPERTS, "head_dim": 10}),
    "heads-that-do-not-divide": ("INTERNLM2", {"hidden_size": 50, "head_dim": 8, **GQA}),
}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_loads_and_computes_the_same(tmp_path: Path, name: str) -> None:
    model_type, keys = FAMILIES[name]
    model, checkpoint = save(tmp_path / "ours", model_type, **keys)
    convert_to_hf(checkpoint, storage_path(tmp_path / "hf"))
    layout = weight_layout(model.architecture, model_type, published=False)
    assert_same_tensors(tensors_of(tmp_path / "hf"), to_hf(model.state_dict(), model.architecture, layout))
    tokens = random_tokens(2, 21)
    with torch.no_grad():
        ours = model.logits(model(tokens, torch.arange(21).expand(2, -1)))
        assert_same_logits(ours, load_native(tmp_path / "hf")(tokens).logits)


def test_internlm3_has_its_own_class(tmp_path: Path) -> None:
    _, checkpoint = save(tmp_path / "ours", "INTERNLM3", **GQA)
    convert_to_hf(checkpoint, storage_path(tmp_path / "hf"))
    assert config_of(tmp_path / "hf")["model_type"] == "internlm3"


def test_rotary_keys_are_there_for_older_versions_of_transformers(tmp_path: Path) -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    _, checkpoint = save(tmp_path / "ours", "LLAMA2", rope_base=5e5, rope_scaling=scaling)
    convert_to_hf(checkpoint, storage_path(tmp_path / "hf"))
    config = config_of(tmp_path / "hf")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e5
    assert config["rope_scaling"].items() <= config["rope_parameters"].items()
    assert config["rope_scaling"]["rope_type"] == "yarn" and config["torch_dtype"] == "float32"


@pytest.mark.parametrize(
    ("model_type", "kind", "weight"),
    [
        ("INTERNLM", "internlm", "model.layers.0.self_attn.q_proj.bias"),
        ("INTERNLM2", "internlm2", "model.layers.0.attention.wqkv.weight"),
        ("BAICHUAN2", "baichuan", "model.layers.0.self_attn.W_pack.weight"),
        ("QWEN3", "qwen3", "model.layers.0.self_attn.q_norm.weight"),
    ],
)
def test_published_names_and_configs(tmp_path: Path, model_type: str, kind: str, weight: str) -> None:
    _, checkpoint = save(tmp_path / "ours", model_type)
    convert_to_hf(checkpoint, storage_path(tmp_path / "hf"), layout="published")
    assert weight in tensors_of(tmp_path / "hf")
    assert config_of(tmp_path / "hf")["model_type"] == kind


@pytest.mark.parametrize(
    ("model_type", "keys", "reason"),
    [
        ("INTERNLM2", {"mlp_bias": True}, "mlp_bias"),
        ("INTERNLM2", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling of type 'yarn'"),
        ("BAICHUAN2", GQA, "fewer key-value heads"),
        ("BAICHUAN2", {"rope_base": 5e5}, "rope_base"),
        ("INTERNLM", {"head_dim": 10}, "a head_dim"),
    ],
)
def test_what_published_code_lacks_is_refused(
    tmp_path: Path, model_type: str, keys: dict[str, Any], reason: str
) -> None:
    _, checkpoint = save(tmp_path / "ours", model_type, **keys)
    with pytest.raises(ConfigError, match=f"published code of {model_type} .*{reason}"):
        convert_to_hf(checkpoint, storage_path(tmp_path / "hf"), layout="published")
    assert not (tmp_path / "hf").exists()


def test_what_transformers_lacks_is_refused_before_a_run() -> None:
    config = Config.model_validate(
        {
            "model_type": "LLAMA2",
            "model": {"vocab_size": 97, "hidden_size": 48, "num_layers": 1, "num_attention_heads": 6, "o_bias": True},
            "data": {"seq_len": 8, "micro_bsz": 1, "total_steps": 1},
        }
    )
    with pytest.raises(ConfigError, match="transformers has no class for this model: o_bias without qkv_bias"):
        check_exportable(config)


def test_files_of_the_size_asked_for(tmp_path: Path) -> None:
    _, checkpoint = save(tmp_path / "ours", "LLAMA2")
    convert_to_hf(checkpoint, storage_path(tmp_path / "hf"), max_shard_bytes=40_000)
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors" and len(files) > 3
    assert all(path.stat().st_size < 44_000 for path in (tmp_path / "hf").glob("*.safetensors"))
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    tensors = tensors_of(tmp_path / "hf")
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


def tokenizer_file(folder: Path) -> Path:
    """A tokenizer.json alone, trained on a line of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<|endoftext|>"])  # type: ignore[call-arg]
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 2, trainer)
    tokenizer.save(str(folder / "own.json"))
    return folder / "own.json"


@pytest.mark.parametrize("by_option", [True, False])
def test_a_tokenizer_of_the_users_own_comes_along(tmp_path: Path, by_option: bool) -> None:
    path = tokenizer_file(tmp_path)
    model = tiny_model("LLAMA2")
    checkpoint = write(tmp_path / "ours", model, "LLAMA2", {} if by_option else {"tokenizer_path": str(path)})
    convert_to_hf(checkpoint, storage_path(tmp_path / "hf"), tokenizer=storage_path(path) if by_option else None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = tokenizer("the lazy fox")["input_ids"]
    assert tokenizer.decode(ids).strip() == "the lazy fox" and tokenizer.eos_token == "<|endoftext|>"
    assert config_of(tmp_path / "hf")["eos_token_id"] == tokenizer.eos_token_id == 0
    assert load_native(tmp_path / "hf").generation_config.eos_token_id == 0


def test_a_tokenizer_that_was_moved_away_does_not_keep_the_weights_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = write(tmp_path / "ours", tiny_model("LLAMA2"), "LLAMA2", {"tokenizer_path": str(tmp_path / "gone")})
    convert_to_hf(checkpoint, storage_path(tmp_path / "hf"))
    load_native(tmp_path / "hf")
    with pytest.raises(CheckpointError, match="no such tokenizer"):
        convert_to_hf(checkpoint, storage_path(tmp_path / "hf2"), tokenizer=storage_path(tmp_path / "gone"))


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    _, checkpoint = save(tmp_path / "ours", "LLAMA2")
    (tmp_path / "hf").mkdir()
    convert_to_hf(checkpoint, storage_path(tmp_path / "hf"))
    with pytest.raises(CheckpointError, match="is not empty"):
        convert_to_hf(checkpoint, storage_path(tmp_path / "hf"))


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    _, checkpoint = save(tmp_path / "ours", "LLAMA2")
    path = next((tmp_path / "ours" / "0").glob("*.distcp"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"is damaged: .*{path.name}"):
        convert_to_hf(checkpoint, storage_path(tmp_path / "hf"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours"]


def test_export_next_to_replaces_an_older_export(tmp_path: Path) -> None:
    model, checkpoint = save(tmp_path, "INTERNLM2", **GQA)
    (tmp_path / "0_hf").mkdir()
    (tmp_path / "0_hf" / "model-00001-of-00009.safetensors").write_bytes(b"old")
    (tmp_path / ".writing-0_hf").mkdir()
    (tmp_path / ".writing-0_hf" / "rest").write_bytes(b"of a killed export")
    export_next_to(checkpoint)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "0_hf"]
    load_native(tmp_path / "0_hf")
    assert_same_tensors(tensors_of(tmp_path / "0_hf"), to_hf(model.state_dict(), model.architecture))


def test_export_next_to_in_an_object_store(tmp_path: Path) -> None:
    store = storage_path("memory://bucket/export")
    (store / "0_hf" / "model-00001-of-00009.safetensors").write_bytes(b"old")
    model = tiny_model("INTERNLM2", **GQA)
    export_next_to(write(store, model, "INTERNLM2", **GQA))
    (tmp_path / "hf").mkdir()
    for name in (store / "0_hf").names():
        (tmp_path / "hf" / name).write_bytes((store / "0_hf" / name).read_bytes())
    assert_same_tensors(tensors_of(tmp_path / "hf"), to_hf(model.state_dict(), model.architecture))
    load_native(tmp_path / "hf")


def test_training_does_not_wait_for_transformers() -> None:
    """Runs import these; the library takes seconds, and is wanted only when something is converted."""
    modules = "internlm.convert.to_hf, internlm.convert.checkpoint_types"
    code = f"import sys, {modules}; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
