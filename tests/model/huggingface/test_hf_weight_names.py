"""Weight names and layouts of published checkpoints: there and back, and each row where it belongs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.model import tiny_model

from internlm.model.huggingface.to_config import hf_config
from internlm.model.huggingface.weight_names import Layout, from_hf, to_hf
from internlm.utils.errors import CheckpointError, ConfigError

GQA = {"num_kv_attention_heads": 2}


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
    ],
)
def test_there_and_back(model_type: str, layout: Layout, fused: bool, interleaved: bool) -> None:
    keys: dict[str, Any] = {"enable_qkv_fusion": fused, "mlp_layer_fusion": fused, "qk_interleaved": interleaved}
    model = tiny_model(model_type, norm_head=False, **keys, **GQA)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    state = model.state_dict()
    back = from_hf(to_hf(state, model.architecture, layout), model.architecture, layout)
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
