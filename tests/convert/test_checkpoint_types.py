"""`load_ckpt_info.ckpt_type`: weights of Hugging Face, of Meta, and of a user's own format in a model that trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.commands import start_ranks, start_training, write_config
from helpers.hf_folders import assert_same_tensors, load_native, random_tokens, tensors_of
from helpers.model import tiny_model
from helpers.weights import InMemory
from torch import Tensor, nn

from internlm.convert import checkpoint_types
from internlm.convert.checkpoint_types import open_weights, register_checkpoint_type
from internlm.utils.errors import CheckpointError, ConfigError
from internlm.utils.storage import StoragePath, storage_path

GQA = {"num_kv_attention_heads": 2}


def test_a_format_of_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_types, "_OPENERS", dict(checkpoint_types._OPENERS))
    model = tiny_model("LLAMA2")

    @register_checkpoint_type("ours_doubled")
    def doubled(path: StoragePath, model: nn.Module) -> InMemory:
        assert path == storage_path("/anywhere")
        return InMemory({name: 2 * tensor for name, tensor in model.state_dict().items()})

    source = open_weights("ours_doubled", storage_path("/anywhere"), model)
    assert torch.equal(source.read("output.weight"), 2 * model.output.weight)
    for taken in ("ours_doubled", "hf", "internevo"):
        with pytest.raises(ValueError, match=f"'{taken}' is already registered"):
            register_checkpoint_type(taken)(doubled)


def test_an_unknown_type_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown type 'lama', known: internevo, hf, llama.* Did you mean 'llama'\?"):
        open_weights("lama", storage_path("/anywhere"), tiny_model("LLAMA2"))


@pytest.mark.parametrize("ckpt_type", ["hf", "llama"])
def test_a_model_of_the_users_own_needs_a_type_of_its_own(tmp_path: Path, ckpt_type: str) -> None:
    transformers.LlamaConfig().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises(ConfigError, match="Linear is not a decoder of this package; register your own type"):
        open_weights(ckpt_type, storage_path(tmp_path), nn.Linear(1, 1))


# -- Meta's files ----------------------------------------------------------------------------------------------------


def meta_folder(folder: Path, num_files: int, generation: int, **params: Any) -> Any:
    """Weights of a tiny llama as Meta stores them; returns transformers' model with the same function.

    The rotary rows follow the formula of transformers' conversion script:
    `w.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)`.
    """
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=88,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    meta: dict[str, Tensor] = {}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
        for layer in range(2):
            theirs, ours = f"layers.{layer}.", model.model.layers[layer]
            for name, projection, heads in (("wq", ours.self_attn.q_proj, 6), ("wk", ours.self_attn.k_proj, 2)):
                weight = torch.randn(heads * 8, 48)
                meta[f"{theirs}attention.{name}.weight"] = weight
                projection.weight.copy_(weight.view(heads, 4, 2, 48).transpose(1, 2).reshape(heads * 8, 48))
            meta[f"{theirs}attention.wv.weight"] = ours.self_attn.v_proj.weight
            meta[f"{theirs}attention.wo.weight"] = ours.self_attn.o_proj.weight
            meta[f"{theirs}feed_forward.w1.weight"] = ours.mlp.gate_proj.weight
            meta[f"{theirs}feed_forward.w2.weight"] = ours.mlp.down_proj.weight
            meta[f"{theirs}feed_forward.w3.weight"] = ours.mlp.up_proj.weight
            meta[f"{theirs}attention_norm.weight"] = ours.input_layernorm.weight
            meta[f"{theirs}ffn_norm.weight"] = ours.post_attention_layernorm.weight
    meta["norm.weight"] = model.model.norm.weight
    meta["tok_embeddings.weight"] = model.model.embed_tokens.weight
    meta["output.weight"] = model.lm_head.weight
    meta["rope.freqs"] = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    columns = (".wo.weight", ".w2.weight", *(["tok_embeddings.weight"] if generation < 3 else []))
    for number in range(num_files):
        shard = {
            name: tensor.detach().clone()
            if tensor.dim() == 1
            else tensor.detach().chunk(num_files, dim=1 if name.endswith(columns) else 0)[number].clone()
            for name, tensor in meta.items()
        }
        torch.save(shard, folder / f"consolidated.{number:02}.pth")
    values = {"dim": 48, "n_layers": 2, "n_heads": 6, "n_kv_heads": 2, "norm_eps": 1e-5, "vocab_size": -1, **params}
    (folder / "params.json").write_text(json.dumps(values))
    return model


LLAMA = {**GQA, "vocab_size": 96}


@pytest.mark.parametrize("keys", [{}, {"enable_qkv_fusion": True, "mlp_layer_fusion": True, "qk_interleaved": True}])
@pytest.mark.parametrize(("num_files", "generation"), [(1, 2), (2, 2), (2, 3)])
def test_metas_files_give_the_function_of_transformers(
    tmp_path: Path, num_files: int, generation: int, keys: dict[str, Any]
) -> None:
    theirs = meta_folder(tmp_path, num_files, generation)
    ours = tiny_model("LLAMA2", **LLAMA, **keys)
    source = open_weights("llama", storage_path(tmp_path), ours)
    assert set(source.names()) == set(ours.state_dict())
    for name, tensor in ours.state_dict().items():
        assert source.shape(name) == tuple(tensor.shape)
        tensor.copy_(source.read(name))
    tokens = random_tokens(2, 21) % 96
    with torch.no_grad():
        logits = ours.logits(ours(tokens, torch.arange(21).expand(2, -1)))
        torch.testing.assert_close(logits, theirs(tokens).logits, rtol=0, atol=1e-5 * float(logits.abs().max()))


def test_mistakes_with_metas_files(tmp_path: Path) -> None:
    path = storage_path(tmp_path)
    model = tiny_model("LLAMA2", **LLAMA)
    with pytest.raises(CheckpointError, match="there is no folder of llama weights"):
        open_weights("llama", path / "nowhere", model)
    with pytest.raises(CheckpointError, match=r"no file consolidated.00.pth"):
        open_weights("llama", path, model)
    meta_folder(tmp_path, 2, 2)
    with pytest.raises(
        CheckpointError, match=r"params.json: does not fit this model: n_kv_heads is 2, the model has 6"
    ):
        open_weights("llama", path, tiny_model("LLAMA2", vocab_size=96))
    with pytest.raises(CheckpointError, match=r"'layers.0.feed_forward.w1.weight' has shape \[44, 48\] in each of 2"):
        open_weights("llama", path, tiny_model("LLAMA2", **LLAMA, intermediate_size=80))
    shard = torch.load(tmp_path / "consolidated.01.pth")
    del shard["norm.weight"]
    torch.save(shard, tmp_path / "consolidated.01.pth")
    with pytest.raises(CheckpointError, match=r"consolidated.01.pth' lacks 'norm.weight'"):
        open_weights("llama", path, model)


@pytest.mark.parametrize("content", ["[]", "{", '{"rope_theta": "x"}', '{"rope_theta": 0}'])
def test_params_of_another_form(tmp_path: Path, content: str) -> None:
    meta_folder(tmp_path, 1, 2)
    (tmp_path / "params.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"params\.json: "):
        open_weights("llama", storage_path(tmp_path), tiny_model("LLAMA2", **LLAMA))


def test_frequencies_in_metas_files_that_contradict_params(tmp_path: Path) -> None:
    meta_folder(tmp_path, 1, 2, rope_theta=5e5)
    with pytest.raises(
        CheckpointError, match=r"another model than its params\.json describes: .*about 10000, .* 500000"
    ):
        open_weights("llama", storage_path(tmp_path), tiny_model("LLAMA2", **LLAMA, rope_base=5e5))


def test_what_metas_files_lack_is_left_out_and_what_is_more_is_named(tmp_path: Path) -> None:
    meta_folder(tmp_path, 1, 2)
    state = torch.load(tmp_path / "consolidated.00.pth")
    del state["layers.0.attention.wk.weight"]
    state["extra.weight"] = torch.ones(3)
    torch.save(state, tmp_path / "consolidated.00.pth")
    model = tiny_model("LLAMA2", **LLAMA, enable_qkv_fusion=True)
    source = open_weights("llama", storage_path(tmp_path), model)
    assert set(model.state_dict()) ^ set(source.names()) == {"layers.0.attention.wqkv.weight", "extra.weight"}
    assert source.lacking == {"layers.0.attention.wqkv.weight": ["layers.0.attention.wk.weight"]}
    assert source.shape("extra.weight") == (3,) and torch.equal(source.read("extra.weight"), torch.ones(3))


# -- in training ----------------------------------------------------------------------------------------------------


def save_start(folder: Path) -> None:
    """A Hugging Face model of the shape that the tiny run trains."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="10KB")


FROM_HF = """
model.update(layer_norm_epsilon=1e-6, qk_interleaved=True)
data.update(total_steps=2)
lr_scheduler.update(total_steps=2)
# Steps without effect: what is saved is what was loaded.
adam.update(lr=0.0)
ckpt.update(
    load_ckpt_info=dict(path="{folder}/hf", content=("model",), ckpt_type="hf"),
    checkpoint_every=2,
    enable_internevo2hf_ckpt=True,
)
"""


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (1, "dict()"),
        (2, 'dict(tensor=dict(size=2, mode="mtp"))'),
        (2, 'dict(tensor=dict(size=2, mode="isp"), weight=dict(size=2))'),
        (2, "dict(pipeline=dict(size=2))"),
    ],
)
def test_training_starts_from_a_folder_and_exports_what_it_saves(
    tmp_path: Path, world_size: int, parallel: str
) -> None:
    save_start(tmp_path / "hf")
    config = write_config(tmp_path, FROM_HF.replace("{folder}", str(tmp_path)) + f"parallel = {parallel}\n")
    arguments = ["--config", config, "--run-dir", tmp_path / "run"]
    if world_size == 1:
        assert start_training(arguments, tmp_path / "output.txt").wait() == 0, (tmp_path / "output.txt").read_text()
    else:
        assert [rank.wait() for rank in start_ranks(arguments, tmp_path, world_size)] == [0] * world_size
    export = tmp_path / "checkpoints" / "2_hf"
    assert_same_tensors(tensors_of(export), tensors_of(tmp_path / "hf"))
    load_native(export)


MIXTURE = """
model_type = "QWEN2MOE"
model.update(
    num_experts=4, top_k=2, num_shared_experts=2, moe_type="Dropless", intermediate_size=24,
    moe_layer_kwargs=dict(normalize_expert_weights=False),
)
"""


@pytest.mark.parametrize(
    ("world_size", "parallel"), [(1, "dict()"), (2, 'dict(tensor=dict(size=2, mode="isp"), weight=dict(size=2))')]
)
def test_training_starts_from_a_mixture_of_experts(tmp_path: Path, world_size: int, parallel: str) -> None:
    torch.manual_seed(0)
    config = transformers.Qwen2MoeConfig(
        vocab_size=61,
        hidden_size=32,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=48,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.Qwen2MoeForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(tmp_path / "hf", max_shard_size="10KB")
    text = FROM_HF.replace("{folder}", str(tmp_path)) + MIXTURE + f"parallel = {parallel}\n"
    arguments = ["--config", write_config(tmp_path, text), "--run-dir", tmp_path / "run"]
    if world_size == 1:
        assert start_training(arguments, tmp_path / "output.txt").wait() == 0, (tmp_path / "output.txt").read_text()
    else:
        assert [rank.wait() for rank in start_ranks(arguments, tmp_path, world_size)] == [0] * world_size
    export = tmp_path / "checkpoints" / "2_hf"
    assert_same_tensors(tensors_of(export), tensors_of(tmp_path / "hf"))
    load_native(export)


def test_weights_that_do_not_fit_stop_the_run_by_name(tmp_path: Path) -> None:
    save_start(tmp_path / "hf")
    config = write_config(tmp_path, FROM_HF.replace("{folder}", str(tmp_path)) + "model.update(num_layers=3)\n")
    run = start_training(["--config", config, "--run-dir", tmp_path / "run"], tmp_path / "output.txt")
    assert run.wait() == 2
    assert "model.num_layers: 2 -> 3" in (tmp_path / "output.txt").read_text()
    config = write_config(
        tmp_path,
        FROM_HF.replace("{folder}", str(tmp_path))
        + "model.update(num_layers=3)\nckpt['allow_model_changes'] = ('model.num_layers',)\n",
    )
    run = start_training(["--config", config, "--run-dir", tmp_path / "run"], tmp_path / "output.txt")
    assert run.wait() == 2
    output = (tmp_path / "output.txt").read_text()
    # By their names in the files.
    assert "'model.layers.2.input_layernorm.weight' is missing" in output
    assert "'model.layers.2.self_attn.q_proj.weight' is missing" in output and "wq" not in output
