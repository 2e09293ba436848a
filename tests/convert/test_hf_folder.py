"""Hugging Face folders as sources of weights: for models that fuse otherwise, in old formats, and with mistakes."""

from __future__ import annotations

import json
import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hf_folders import (
    assert_same_logits,
    assert_same_tensors,
    native_model,
    random_tokens,
    save_native,
    tensors_of,
)
from helpers.model import tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from internlm.checkpoint import weight_source
from internlm.checkpoint.load_model import load_model_for_inference
from internlm.cli import main
from internlm.convert.from_hf import convert_from_hf
from internlm.convert.hf_folder import HfFolder, HfWeights
from internlm.convert.to_hf import convert_to_hf
from internlm.model.huggingface.weight_names import from_hf
from internlm.utils.errors import CheckpointError, ConfigError
from internlm.utils.storage import storage_path

GQA = {"num_kv_attention_heads": 2}
EXPERTS = {"num_experts": 5, "top_k": 2, "moe_type": "Dropless", "intermediate_size": 24, "layer_norm_epsilon": 1e-5}


def fill(model: nn.Module, weights: HfWeights) -> None:
    state = model.state_dict()
    assert set(weights.names()) == set(state)
    for name, tensor in state.items():
        assert weights.shape(name) == tuple(tensor.shape)
        tensor.copy_(weights.read(name))


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.logits(model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens)))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("name", "model_type", "keys"),
    [
        ("llama-biases", "INTERNLM", {**GQA, "mlp_bias": True}),
        ("qwen2", "QWEN2", GQA),
        ("qwen3", "QWEN3", {**GQA, "head_dim": 10}),
        ("gemma", "GEMMA", {"head_dim": 12, "num_kv_attention_heads": 1}),
        ("mixtral", "MIXTRALMOE", {**GQA, **EXPERTS, "intermediate_size": 88, "rope_base": 1e6}),
        (
            "qwen2-moe",
            "QWEN2MOE",
            {**GQA, **EXPERTS, "num_shared_experts": 2, "moe_layer_kwargs": {"normalize_expert_weights": False}},
        ),
        ("qwen3-moe", "QWEN3MOE", {**GQA, **EXPERTS, "head_dim": 10}),
    ],
)
def test_the_model_may_fuse_and_interleave_otherwise(
    tmp_path: Path, name: str, model_type: str, keys: dict[str, Any], fused: bool, interleaved: bool
) -> None:
    theirs = save_native(name, tmp_path)
    keys = {**keys, "enable_qkv_fusion": fused, "mlp_layer_fusion": fused, "qk_interleaved": interleaved}
    ours = tiny_model(model_type, **keys)
    fill(ours, HfWeights(HfFolder(storage_path(tmp_path)), ours.architecture))
    tokens = random_tokens(2, 21)
    with torch.no_grad():
        assert_same_logits(logits(ours, tokens), theirs(tokens).logits)


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "qwen3-moe"])
def test_experts_in_one_tensor_as_transformers_holds_them_in_memory(tmp_path: Path, name: str) -> None:
    theirs = save_native(name, tmp_path / "hf")
    convert_from_hf(storage_path(tmp_path / "hf"), storage_path(tmp_path / "single"))
    save_one_file(tmp_path / "hf", {name: tensor.contiguous() for name, tensor in theirs.state_dict().items()})
    assert "model.layers.1.mlp.experts.gate_up_proj" in HfFolder(storage_path(tmp_path / "hf")).entries
    convert_from_hf(storage_path(tmp_path / "hf"), storage_path(tmp_path / "fused"))
    (single, _), (fused, _) = (load_model_for_inference(tmp_path / folder) for folder in ("single", "fused"))
    assert_same_tensors(fused.state_dict(), single.state_dict())


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    save_native("qwen3-moe", tmp_path)
    tensors = tensors_of(tmp_path)
    name = "model.layers.1.mlp.experts.4.down_proj.weight"
    moved = tensors.pop(name)
    save_one_file(tmp_path, {**tensors, name.replace(".4.", ".5."): moved})
    message = rf"'{name}' is missing\n  '{name.replace('.4.', '.5.')}' is not described by config.json"
    with pytest.raises(CheckpointError, match=message):
        convert_from_hf(storage_path(tmp_path), storage_path(tmp_path / "ours"))
    save_one_file(tmp_path, {**tensors, name: moved[:8].contiguous()})
    with pytest.raises(CheckpointError, match=rf"'{name}' has shape \[8, 24\], the model needs \[48, 24\]"):
        convert_from_hf(storage_path(tmp_path), storage_path(tmp_path / "ours"))


def test_quantized_experts_are_refused(tmp_path: Path) -> None:
    theirs = save_native("qwen3-moe", tmp_path)
    tensors = {name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}
    name = "model.layers.1.mlp.experts.gate_up_proj"
    save_one_file(tmp_path, {**tensors, name: tensors[name].to(torch.int8)})
    with pytest.raises(CheckpointError, match=rf"'{name}' is stored as torch.int8"):
        convert_from_hf(storage_path(tmp_path), storage_path(tmp_path / "ours"))


def test_one_projection_of_the_experts_of_a_layer_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the tensors of single experts, the one that is being copied and the next."""
    save_native("qwen3-moe", tmp_path)
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    plain = HfFolder.read

    def read(folder: HfFolder, name: str) -> Tensor:
        nonlocal most
        tensor = plain(folder, name)
        if ".experts." in name:
            alive.append(weakref.ref(tensor))
            most = max(most, sum(reference() is not None for reference in alive))
        return tensor

    monkeypatch.setattr(HfFolder, "read", read)
    convert_from_hf(storage_path(tmp_path), storage_path(tmp_path / "ours"))
    assert most == 2


def test_each_file_tensor_is_read_once_for_a_fused_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_native("llama", tmp_path)
    read: list[str] = []
    plain = HfFolder.read
    monkeypatch.setattr(HfFolder, "read", lambda self, name: read.append(name) or plain(self, name))
    for fused in (True, False):
        read.clear()
        model = tiny_model("LLAMA2", **GQA, enable_qkv_fusion=fused, mlp_layer_fusion=fused)
        weights = HfWeights(HfFolder(storage_path(tmp_path)), model.architecture)
        fill(model, weights)
        assert sorted(read) == sorted(weights.folder.entries)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("sharded", [True, False])
def test_bin_files(tmp_path: Path, sharded: bool, zipped: bool) -> None:
    """As torch.save wrote them before safetensors, also before it wrote zip archives."""
    theirs = native_model("llama")
    theirs.config.save_pretrained(tmp_path)
    state = {name: tensor.detach().clone() for name, tensor in theirs.state_dict().items()}
    # As old versions did.
    frequencies = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    angles = torch.outer(torch.arange(64.0), frequencies).repeat(1, 2)
    before = "model.layers.0.self_attn.rotary_emb"
    state[f"{before}.inv_freq"] = frequencies.half() if sharded else frequencies
    state[f"{before}.cos_cached"], state[f"{before}.sin_cached"] = angles.cos()[None, None], angles.sin()[None, None]
    state["model.position_ids"] = torch.arange(64)[None]
    if sharded:
        names = list(state)
        parts = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
        index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        parts = {"pytorch_model.bin": list(state)}
    for file, part in parts.items():
        torch.save({n: state[n] for n in part}, tmp_path / file, _use_new_zipfile_serialization=zipped)
    ours = tiny_model("LLAMA2", **GQA)
    fill(ours, HfWeights(HfFolder(storage_path(tmp_path)), ours.architecture))
    tokens = random_tokens(2, 21)
    with torch.no_grad():
        assert_same_logits(logits(ours, tokens), theirs(tokens).logits)


def test_a_bin_file_with_code_is_refused(tmp_path: Path) -> None:
    native_model("llama").config.save_pretrained(tmp_path)

    class Exploit:
        def __reduce__(self) -> tuple[Any, ...]:
            return (exec, ("raise SystemExit('code of the file ran')",))

    torch.save({"a": Exploit()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: cannot be read"):
        HfFolder(storage_path(tmp_path))


def edit_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))


def save_one_file(folder: Path, tensors: dict[str, Tensor]) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    save_file(tensors, folder / "model.safetensors")


def test_a_tied_head_that_was_saved_all_the_same_is_left_out(tmp_path: Path) -> None:
    save_native("llama-tied", tmp_path)
    tensors = tensors_of(tmp_path)
    save_one_file(tmp_path, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    tied = tiny_model("LLAMA2", **GQA, tie_word_embeddings=True)
    weights = HfWeights(HfFolder(storage_path(tmp_path)), tied.architecture)
    fill(tied, weights)
    assert "output.weight" not in weights.names()
    assert torch.equal(tied.head_weight(), tensors["model.embed_tokens.weight"])


def test_a_head_that_is_not_the_embedding_it_is_tied_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """config.json says tied, the file has another head: neither is thrown away."""
    theirs = save_native("llama", tmp_path / "hf")
    edit_config(tmp_path / "hf", tie_word_embeddings=True)
    folder = HfFolder(storage_path(tmp_path / "hf"))
    message = (
        r"'lm_head.weight' differs from the embedding in [\d,]+ of 4,656 values.*--untie.*tie_word_embeddings = False"
    )
    with pytest.raises(CheckpointError, match=message):
        HfWeights(folder, tiny_model("LLAMA2", **GQA, tie_word_embeddings=True).architecture)
    assert main(["convert", "from-hf", "--hf", str(tmp_path / "hf"), "--out", str(tmp_path / "ours")]) == 2
    assert "'lm_head.weight' differs from the embedding" in capsys.readouterr().err
    untied = tiny_model("LLAMA2", **GQA)
    fill(untied, HfWeights(folder, untied.architecture))
    convert_from_hf(folder.path, storage_path(tmp_path / "ours"), untie=True)
    imported, config = load_model_for_inference(tmp_path / "ours")
    assert config.model.tie_word_embeddings is False
    tokens = random_tokens(2, 21)
    with torch.no_grad():
        for model in (untied, imported):
            assert_same_logits(logits(model, tokens), theirs(tokens).logits)
    with pytest.raises(CheckpointError, match="differs from the embedding"):
        from_hf(theirs.state_dict(), tiny_model("LLAMA2", **GQA, tie_word_embeddings=True).architecture)


@pytest.mark.parametrize("position", [(0, 0), (-1, -1)])
def test_a_head_that_is_the_embedding_but_for_one_value(tmp_path: Path, position: tuple[int, int]) -> None:
    save_native("llama-tied", tmp_path)
    tensors = tensors_of(tmp_path)
    head = tensors["model.embed_tokens.weight"].clone()
    head[position] += torch.finfo(head.dtype).eps * head[position]
    save_one_file(tmp_path, {**tensors, "lm_head.weight": head})
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' differs from the embedding in 1 of 4,656 values"):
        convert_from_hf(storage_path(tmp_path), storage_path(tmp_path / "ours"))


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("inv_freq", 5e5 ** -(torch.arange(0, 8, 2) / 8), "a rotary base of about 500000, the config says 10000"),
        ("inv_freq", torch.ones(4), "'model.layers.1.self_attn.rotary_emb.inv_freq' has the frequencies"),
        ("inv_freq", torch.ones(5), "contradicts the config"),
        ("cos_cached", torch.ones(64, 8), "cos_cached' contradicts the config"),
    ],
)
def test_a_buffer_that_contradicts_the_config(tmp_path: Path, name: str, values: Tensor, message: str) -> None:
    save_native("llama", tmp_path)
    save_one_file(tmp_path, {**tensors_of(tmp_path), f"model.layers.1.self_attn.rotary_emb.{name}": values})
    with pytest.raises(CheckpointError, match=message):
        convert_from_hf(storage_path(tmp_path), storage_path(tmp_path / "ours"))


def test_a_buffer_of_integers_is_no_quantized_weight(tmp_path: Path) -> None:
    save_native("llama", tmp_path)
    save_one_file(tmp_path, {**tensors_of(tmp_path), "model.counts": torch.ones(3, dtype=torch.int64)})
    with pytest.raises(CheckpointError, match=r"'model\.counts' is not described by config\.json"):
        convert_from_hf(storage_path(tmp_path), storage_path(tmp_path / "ours"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(tmp_path: Path, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_source, "_BLOCK", 7)
    save_native("llama", tmp_path)
    tensors = tensors_of(tmp_path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_one_file(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=r"'layers\.1\..*' has 1 of .* values that are not finite"):
        convert_from_hf(storage_path(tmp_path), storage_path(tmp_path / "ours"))
    assert not (tmp_path / "ours" / "0").exists()


def test_values_that_the_dtype_cannot_hold_are_named(tmp_path: Path) -> None:
    save_native("llama", tmp_path / "hf")
    tensors = tensors_of(tmp_path / "hf")
    tensors["model.norm.weight"][3] = -1e5
    save_one_file(tmp_path / "hf", tensors)
    source, message = (
        storage_path(tmp_path / "hf"),
        "'{}' has values up to 1e\\+05, above the largest float16, 6.55e\\+04.*bf16 or",
    )
    with pytest.raises(CheckpointError, match=message.format("norm.weight")):
        convert_from_hf(source, storage_path(tmp_path / "half"), dtype=torch.float16)
    checkpoint = convert_from_hf(source, storage_path(tmp_path / "ours"))
    with pytest.raises(CheckpointError, match=message.format("model.norm.weight")):
        convert_to_hf(checkpoint, storage_path(tmp_path / "out"), dtype=torch.float16)
    assert not (tmp_path / "out").exists() and not (tmp_path / "half" / "0").exists()
    convert_to_hf(checkpoint, storage_path(tmp_path / "out"), dtype=torch.bfloat16)


def test_a_head_of_its_own_starts_from_a_tied_one(tmp_path: Path) -> None:
    theirs = save_native("gemma", tmp_path)
    ours = tiny_model("GEMMA", num_kv_attention_heads=1, head_dim=12, tie_word_embeddings=False)
    fill(ours, HfWeights(HfFolder(storage_path(tmp_path)), ours.architecture))
    tokens = random_tokens(2, 21)
    with torch.no_grad():
        assert_same_logits(logits(ours, tokens), theirs(tokens).logits)


def test_a_head_of_its_own_is_not_dropped_for_a_tied_model(tmp_path: Path) -> None:
    save_native("llama", tmp_path)
    tied = tiny_model("LLAMA2", **GQA, tie_word_embeddings=True)
    assert "lm_head.weight" in HfWeights(HfFolder(storage_path(tmp_path)), tied.architecture).names()


def test_missing_and_unexpected_tensors_are_named(tmp_path: Path) -> None:
    save_native("llama", tmp_path)
    tensors = tensors_of(tmp_path)
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_one_file(tmp_path, {**tensors, "model.layers.0.mlp.experts.weight": torch.ones(1)})
    ours = tiny_model("LLAMA2", **GQA, enable_qkv_fusion=True)
    weights = HfWeights(HfFolder(storage_path(tmp_path)), ours.architecture)
    # A weight of which a part is missing is missing.
    assert set(ours.state_dict()) - set(weights.names()) == {"layers.1.attention.wqkv.weight"}
    assert set(weights.names()) - set(ours.state_dict()) == {"model.layers.0.mlp.experts.weight"}
    assert weights.lacking == {"layers.1.attention.wqkv.weight": ["model.layers.1.self_attn.k_proj.weight"]}
    message = (
        r"'model.layers.1.self_attn.k_proj.weight' is missing\n  'model.layers.0.mlp.experts.weight' is not described"
    )
    with pytest.raises(CheckpointError, match=message):
        convert_from_hf(storage_path(tmp_path), storage_path(tmp_path / "ours"))
    assert not (tmp_path / "ours").exists()


def test_a_wrong_shape_is_named(tmp_path: Path) -> None:
    save_native("llama", tmp_path)
    ours = tiny_model("LLAMA2", **GQA, intermediate_size=80)
    with pytest.raises(
        CheckpointError, match=r"'model.layers.0.mlp.gate_proj.weight' has shape \[88, 48\].*\[80, 48\]"
    ):
        HfWeights(HfFolder(storage_path(tmp_path)), ours.architecture)


def test_folders_that_are_none(tmp_path: Path) -> None:
    folder = storage_path(tmp_path / "folder")
    with pytest.raises(CheckpointError, match="there is no Hugging Face folder at"):
        HfFolder(folder)
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match=r"has no config.json"):
        HfFolder(folder)
    save_native("llama", tmp_path / "folder")
    next((tmp_path / "folder").glob("model-00002-of-*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match=r"lacks 'model-00002-of-0000.*index.json names"):
        HfFolder(folder)
    for path in (tmp_path / "folder").glob("model*"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"has no weights: none of model\.safetensors"):
        HfFolder(folder)
    (tmp_path / "folder" / "config.json").write_text("{")
    (tmp_path / "folder" / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        HfFolder(folder)


def test_links_are_followed(tmp_path: Path) -> None:
    """As in the cache of the Hugging Face hub."""
    save_native("llama", tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(Path("..") / "blobs" / path.name)
    convert_from_hf(storage_path(tmp_path / "snapshot"), storage_path(tmp_path / "ours"))
    assert (tmp_path / "ours" / "0" / "hf" / "config.json").is_file()


def test_an_index_that_does_not_fit_its_files(tmp_path: Path) -> None:
    save_native("llama", tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.norm.weight"] = files[0]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lacks 'model.norm.weight', which the index lists"):
        HfFolder(storage_path(tmp_path))


@pytest.mark.parametrize("places", [[1], {"model.norm.weight": 3}, None])
def test_an_index_of_another_form(tmp_path: Path, places: Any) -> None:
    save_native("llama", tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(CheckpointError, match="'weight_map' must map names of tensors to files"):
        HfFolder(storage_path(tmp_path))


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    save_native("llama", tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    first, last = (sorted(set(index["weight_map"].values()))[place] for place in (0, -1))
    save_file({**load_file(tmp_path / last), "model.embed_tokens.weight": torch.ones(97, 48)}, tmp_path / last)
    with pytest.raises(CheckpointError, match=f"both {first} and {last} contain 'model.embed_tokens.weight'"):
        HfFolder(storage_path(tmp_path))


def test_weight_files_that_are_not_read_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("internlm"), "propagate", True)
    save_native("llama-tied", tmp_path)
    save_one_file(tmp_path, tensors_of(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"older")
    with caplog.at_level(logging.INFO, "internlm"):
        HfFolder(storage_path(tmp_path))
    assert "model.safetensors takes precedence; not read: pytorch_model.bin" in caplog.text


@pytest.mark.parametrize("content", [{"state_dict": {"a": torch.ones(1)}}, {1: torch.ones(1)}])
def test_a_bin_file_of_another_form(tmp_path: Path, content: Any) -> None:
    native_model("llama").config.save_pretrained(tmp_path)
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="must contain tensors by name, but"):
        HfFolder(storage_path(tmp_path))


def test_a_quantized_model_is_refused(tmp_path: Path) -> None:
    save_native("llama", tmp_path)
    edit_config(tmp_path, quantization_config={"quant_method": "gptq"})
    with pytest.raises(ConfigError, match="quantization_config"):
        convert_from_hf(storage_path(tmp_path), storage_path(tmp_path / "ours"))
    edit_config(tmp_path, quantization_config=None)
    tensors = tensors_of(tmp_path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_one_file(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' is stored as torch.int8"):
        convert_from_hf(storage_path(tmp_path), storage_path(tmp_path / "ours"))


def test_a_checkpoint_is_not_overwritten(tmp_path: Path) -> None:
    save_native("llama", tmp_path)
    convert_from_hf(storage_path(tmp_path), storage_path(tmp_path / "ours"))
    with pytest.raises(CheckpointError, match=r"'.*ours/0' already exists"):
        convert_from_hf(storage_path(tmp_path), storage_path(tmp_path / "ours"))


def test_layers_of_multi_token_prediction_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_native("glm4-moe", tmp_path / "hf")
    weights = tensors_of(tmp_path / "hf")
    for path in (tmp_path / "hf").glob("*.safetensors*"):
        path.unlink()
    layer = {
        name.replace("layers.1.", "layers.2."): tensor.clone()
        for name, tensor in weights.items()
        if ".layers.1." in name
    }
    save_file({**weights, **layer, "model.layers.2.enorm.weight": torch.ones(48)}, tmp_path / "hf/model.safetensors")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    convert_from_hf(storage_path(tmp_path / "hf"), storage_path(tmp_path / "new"))
    assert "layers of multi-token prediction are not imported" in caplog.text
    convert_to_hf(storage_path(tmp_path / "new/0"), storage_path(tmp_path / "back"), tokenizer=None)
    assert_same_tensors(tensors_of(tmp_path / "back"), weights)
