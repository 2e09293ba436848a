"""DeepSeek's configs of Hugging Face, as they were published, in our words, and back."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from helpers.hf_configs import LLAMA, MIXTURES, architecture, function
from helpers.model import tiny_config

from internlm.config.schema import ModelConfig
from internlm.model.huggingface.from_config import from_hf_config
from internlm.model.huggingface.to_config import transformers_config_json
from internlm.model.registry import build_model
from internlm.utils.errors import ConfigError

YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
V3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "ep_size": 1,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 3,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": YARN,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
V2_LITE = {
    **V3,
    "model_type": "deepseek_v2",
    "architectures": ["DeepseekV2ForCausalLM"],
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1,
    "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
}
KIMI = {
    **V3,
    "model_type": "kimi_k2",
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.827,
    "vocab_size": 163840,
    "rope_theta": 50000.0,
    "rope_scaling": {**YARN, "factor": 32.0, "beta_fast": 1.0},
}


@pytest.mark.parametrize(
    ("values", "model_type", "billions"),
    [(V3, "DEEPSEEK_V3", 671.03), (V2_LITE, "DEEPSEEK_V2", 15.71), (KIMI, "KIMI_K2", 1026.41)],
    ids=["v3", "v2-lite", "kimi-k2"],
)
def test_published_models(values: dict[str, Any], model_type: str, billions: float) -> None:
    found = from_hf_config(values, "config.json")
    assert (found.model_type, found.notices) == (model_type, ())
    with torch.device("meta"):
        model: Any = build_model(found.model_type, ModelConfig(**found.keys, dtype=found.dtype))  # type: ignore[arg-type]
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.006)
    back = from_hf_config(transformers_config_json(model.architecture, model_type), "config.json")
    theirs = architecture(back.model_type, ModelConfig(**back.keys, dtype=back.dtype))  # type: ignore[arg-type]
    assert function(theirs) == function(model.architecture)


CHOICES: dict[str, tuple[Any, ...]] = {
    "q_lora_rank": (None, 20),
    "num_shared_experts": (0, 1, 3),
    "first_k_dense_replace": (0, 1),
    "qk_interleaved": (False, True),
    "scoring_func": ("softmax", "sigmoid"),
    "normalize_expert_weights": (False, True),
    "selection_bias": (False, True),
    "n_group": (1, 2),
    "group_score": ("max", "top2_sum"),
}


def test_every_model_that_is_exported_comes_back_as_it_was() -> None:
    exported = 0
    for choice in itertools.product(*CHOICES.values()):
        keys: dict[str, Any] = dict(zip(CHOICES, choice, strict=True))
        router = {name: keys.pop(name) for name in list(keys)[4:]}
        latent = {"kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
        config = tiny_config(
            **{**keys, **latent, "num_kv_attention_heads": None, "head_dim": None},
            num_experts=4,
            top_k=2,
            moe_type="Dropless",
            moe_intermediate_size=24,
            moe_layer_kwargs=router,
        )
        ours = architecture("DEEPSEEK_V3", config)
        try:
            values = transformers_config_json(ours, "DEEPSEEK_V3")
        except ConfigError:
            continue
        exported += 1
        back = from_hf_config(values, "config.json")
        theirs = architecture(back.model_type, ModelConfig(**back.keys, dtype=back.dtype))  # type: ignore[arg-type]
        # Without groups, nothing ranks them.
        used = {} if router["n_group"] > 1 else {"group_score": "max"}
        assert _routed(function(theirs), used) == _routed(function(ours), used), (keys, values)
    # 2 ranks of queries, 2 shared experts, dense or not, 2 orders of pairs: softmax without a bias, with any score of
    # groups where there are none; sigmoid likewise, with 2 weightings.
    assert exported == 16 * (3 + 2 * 3)


def _routed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    experts = values["experts"]
    return {**values, "experts": dataclasses.replace(experts, form=dataclasses.replace(experts.form, **changes))}


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        (
            "deepseek_v3",
            {"scoring_func": "softmax"},
            "scoring_func = 'softmax': transformers' class",
        ),
        (
            "deepseek_v2",
            {"scoring_func": "sigmoid"},
            "scoring_func = 'sigmoid': transformers' class",
        ),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq = 2"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method = 'greedy'"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave = False"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias = True"),
        ("deepseek_v2", {"mlp_bias": True}, "mlp_bias = True"),
        ("kimi_k2", {"num_key_value_heads": 2}, "num_key_value_heads = 2 of 6 heads"),
        ("deepseek_v3", {"kv_lora_rank": 0}, "kv_lora_rank must be a whole number from 1"),
        ("deepseek_v3", {"num_nextn_predict_layers": "two"}, "num_nextn_predict_layers must be a whole number from 0"),
        (
            "deepseek_v3",
            {"rope_scaling": {**YARN, "mscale_all_dim": 0}},
            "mscale without mscale_all_dim, which transformers ignores",
        ),
    ],
)
def test_what_is_another_function_is_refused_by_name(kind: str, changes: dict[str, Any], reason: str) -> None:
    values = {**LLAMA, **MIXTURES[kind], "model_type": kind, **changes}
    with pytest.raises(ConfigError, match=reason):
        from_hf_config(values, "config.json")


def test_keys_that_concern_training_alone_are_named() -> None:
    values = {**LLAMA, **MIXTURES["deepseek_v2"], "model_type": "deepseek_v2", "norm_topk_prob": True}
    assert from_hf_config({**values, "aux_loss_alpha": 0.001}, "config.json").notices == (
        "aux_loss_alpha = 0.001: not imported; set loss.moe_loss_coeff, whose default is another",
        "norm_topk_prob = True: ignored, as transformers' class of DeepSeek-V2 does not read it",
    )


def test_latent_attention_of_other_models_is_not_exported() -> None:
    latent = {"kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
    config = tiny_config(**latent, num_kv_attention_heads=None, head_dim=None)
    with pytest.raises(ConfigError, match="latent attention without experts"):
        transformers_config_json(architecture("DEEPSEEK_V3", config), "DEEPSEEK_V3")
