"""Weight names and layouts of published checkpoints: there and back, and each row where it belongs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.model import tiny_config, tiny_model

from internlm.model.huggingface.to_config import hf_config
from internlm.model.huggingface.weight_names import Layout, from_hf, to_hf, weight_groups
from internlm.model.registry import build_model
from internlm.utils.errors import CheckpointError, ConfigError

GQA = {"num_kv_attention_heads": 2}

EXPERTS = {"num_experts": 3, "top_k": 2, "moe_type": "Dropless", "intermediate_size": 16}
EXPERT_LAYOUTS: tuple[Layout, ...] = ("transformers", "mixtral", "fused_experts")


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("model_type", "layout"),
    [
        ("INTERNLM", "transformers"),
        ("INTERNLM2", "transformers"),
        ("INTERNLM2", "internlm2"),
        ("QWEN3", "transformers"),
        ("BAICHUAN2", "baichuan2"),
        ("GEMMA", "transformers"),
        *((model_type, layout) for model_type in ("MIXTRALMOE", "QWEN2MOE", "QWEN3MOE") for layout in EXPERT_LAYOUTS),
    ],
)
def test_there_and_back(model_type: str, layout: Layout, fused: bool, interleaved: bool) -> None:
    keys: dict[str, Any] = {"enable_qkv_fusion": fused, "mlp_layer_fusion": fused, "qk_interleaved": interleaved}
    if model_type.endswith("MOE"):
        keys |= EXPERTS | {"num_shared_experts": 2 if model_type == "QWEN2MOE" else 0}
        keys["moe_layer_kwargs"] = {"selection_bias": model_type == "QWEN3MOE"}
    model = tiny_model(model_type, norm_head=False, **keys, **GQA)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    state = model.state_dict()
    theirs = to_hf(state, model.architecture, layout)
    if model_type == "QWEN3MOE":
        gate = "block_sparse_moe" if layout == "mixtral" else "mlp"
        assert f"model.layers.1.{gate}.gate.e_score_correction_bias" in theirs
    back = from_hf(theirs, model.architecture, layout)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_published_internlm2() -> None:
    """By key-value group: g query heads, then the key, then the value (here 3 + 1 + 1 heads of 8 rows)."""
    model = tiny_model("INTERNLM2", enable_qkv_fusion=False, **GQA)
    state = to_hf(model.state_dict(), model.architecture, "internlm2")
    assert {"model.tok_embeddings.weight", "model.norm.weight", "output.weight"} <= state.keys()
    fused = state["model.layers.1.attention.wqkv.weight"]
    attention = model.layers["1"].attention
    assert torch.equal(fused[40:64], attention.wq.weight[24:48])
    assert torch.equal(fused[64:72], attention.wk.weight[8:16])
    assert torch.equal(fused[72:80], attention.wv.weight[8:16])
    assert torch.equal(state["model.layers.1.feed_forward.w3.weight"], model.layers["1"].feed_forward.w3.weight)


def test_published_baichuan2() -> None:
    model = tiny_model("BAICHUAN2", enable_qkv_fusion=False)
    state = to_hf(model.state_dict(), model.architecture, "baichuan2")
    attention = model.layers["0"].attention
    packed = torch.cat((attention.wq.weight, attention.wk.weight, attention.wv.weight))
    assert torch.equal(state["model.layers.0.self_attn.W_pack.weight"], packed)
    # The published code normalises the head itself; for transformers' classes it is normalised in the file.
    assert torch.equal(state["lm_head.weight"], model.output.weight)
    plain = to_hf(model.state_dict(), model.architecture)
    torch.testing.assert_close(plain["lm_head.weight"].norm(dim=1), torch.ones(97))


@pytest.mark.parametrize(
    ("layout", "block", "gate", "up", "down"),
    [("mixtral", "block_sparse_moe", "w1", "w3", "w2"), ("transformers", "mlp", "gate_proj", "up_proj", "down_proj")],
)
def test_published_experts(layout: Layout, block: str, gate: str, up: str, down: str) -> None:
    model = tiny_model("QWEN2MOE", **EXPERTS, num_shared_experts=0 if layout == "mixtral" else 2)
    state = to_hf(model.state_dict(), model.architecture, layout)
    ours, before = model.layers["1"].feed_forward, f"model.layers.1.{block}."
    for number in range(3):
        expert = f"{before}experts.{number}."
        assert torch.equal(state[f"{expert}{gate}.weight"], ours.experts.w13[number, :16])
        assert torch.equal(state[f"{expert}{up}.weight"], ours.experts.w13[number, 16:])
        assert torch.equal(state[f"{expert}{down}.weight"], ours.experts.w2[number])
    assert torch.equal(state[f"{before}gate.weight"], ours.router.weight)
    assert not any(".feed_forward." in name or f"{before}experts.3." in name for name in state)
    if layout == "transformers":
        assert torch.equal(state[f"{before}shared_expert.up_proj.weight"], ours.shared.w3.weight)
        assert torch.equal(state[f"{before}shared_expert_gate.weight"], ours.shared_gate.weight)


def test_experts_in_memory() -> None:
    """As transformers 5 holds them: all experts of a layer in one tensor, which is not copied."""
    model = tiny_model("MIXTRALMOE", **EXPERTS)
    state = to_hf(model.state_dict(), model.architecture, "fused_experts")
    experts = model.layers["1"].feed_forward.experts
    assert state["model.layers.1.mlp.experts.gate_up_proj"].data_ptr() == experts.w13.data_ptr()
    assert torch.equal(state["model.layers.1.mlp.experts.down_proj"], experts.w2)
    assert "model.layers.1.mlp.gate.weight" in state


def test_a_group_has_one_projection_of_the_experts_of_a_layer() -> None:
    with torch.device("meta"):
        model = build_model("QWEN2MOE", tiny_config(**EXPERTS, num_shared_experts=1, mlp_layer_fusion=True))
    groups = weight_groups(dict(model.named_parameters()), model.architecture)  # type: ignore[arg-type]
    sizes = {
        tuple(group.ours): len(group.theirs) for group in groups if any(".1.feed_for" in name for name in group.ours)
    }
    before = "layers.1.feed_forward."
    assert sizes == {
        (f"{before}router.weight",): 1,
        (f"{before}experts.w13",): 6,
        (f"{before}experts.w2",): 3,
        (f"{before}shared.w13.weight",): 2,
        (f"{before}shared.w2.weight",): 1,
        (f"{before}shared_gate.weight",): 1,
    }


def test_experts_of_several_dtypes_get_the_one_that_holds_all() -> None:
    model = tiny_model("QWEN3MOE", **EXPERTS)
    state = to_hf(model.state_dict(), model.architecture)
    single = {name: tensor.bfloat16() if ".experts.0." in name else tensor for name, tensor in state.items()}
    back = from_hf(single, model.architecture)["layers.0.feed_forward.experts.w13"]
    expected = model.layers["0"].feed_forward.experts.w13.clone()
    expected[0] = expected[0].bfloat16()
    assert back.dtype == torch.float32 and torch.equal(back, expected)


def test_incomplete_experts() -> None:
    model = tiny_model("QWEN3MOE", **EXPERTS)
    state = to_hf(model.state_dict(), model.architecture)
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    with pytest.raises(CheckpointError, match=r"'layers.0.feed_forward.experts.w13': 1 weights of experts are missing"):
        from_hf({key: tensor for key, tensor in state.items() if key != name}, model.architecture)
    with pytest.raises(CheckpointError, match=rf"'{name}' has shape \[8, 48\], unlike the weights of other experts"):
        from_hf({**state, name: state[name][:8]}, model.architecture)


def test_interleaved_pairs_become_halves() -> None:
    model = tiny_model("LLAMA2", qk_interleaved=True, head_dim=6)
    state = to_hf(model.state_dict(), model.architecture)
    wk = model.layers["0"].attention.wk.weight
    assert torch.equal(state["model.layers.0.self_attn.k_proj.weight"][:6], wk[[0, 2, 4, 1, 3, 5]])


def test_unknown_weight() -> None:
    architecture = tiny_model("LLAMA2").architecture
    with pytest.raises(CheckpointError, match=r"unknown weight 'model.layers.0.mlp.experts.weight'"):
        from_hf({"model.layers.0.mlp.experts.weight": torch.zeros(1)}, architecture)


def test_dynamic_scaling_keeps_the_pretrained_length() -> None:
    config = hf_config(tiny_model("LLAMA2", rope_scaling={"type": "dynamic", "factor": 2.0}).architecture)
    assert config.max_position_embeddings == 2048 and config.rope_parameters["rope_type"] == "dynamic"


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"norm_type": "layernorm"}, "layernorm"),
        ({"is_reward": True}, "is_reward"),
        ({"o_bias": True}, "o_bias without qkv_bias"),
        ({"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, "windows in some layers"),
    ],
)
def test_what_transformers_lacks_is_refused(keys: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        hf_config(tiny_model("LLAMA2", **keys).architecture)
