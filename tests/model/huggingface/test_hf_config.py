"""Configs of Hugging Face in our words and back."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from helpers.hf_configs import LLAMA, MIXTURES, architecture, function
from helpers.model import tiny_config

from internlm.config.schema import ModelConfig
from internlm.model.huggingface.from_config import from_hf_config
from internlm.model.huggingface.to_config import published_config_json, transformers_config_json
from internlm.utils.errors import ConfigError

BOOLS = ("qkv_bias", "o_bias", "mlp_bias", "qk_norm", "tie_word_embeddings", "windows", "odd_heads")


@pytest.mark.parametrize("model_type", ["LLAMA2", "GEMMA", "INTERNLM3", "QWEN2"])
def test_every_combination_that_is_exported_comes_back_as_it_was(model_type: str) -> None:
    """All switches at once: what `hf_config` does not refuse is the same model when it is read back."""
    exported = 0
    for choice in itertools.product([False, True], repeat=len(BOOLS)):
        keys: dict[str, Any] = dict(zip(BOOLS, choice, strict=True))
        windows, odd_heads = keys.pop("windows"), keys.pop("odd_heads")
        for first in (0, 1) if windows else (0,):
            keys |= {"sliding_window": 5, "use_sliding_window": windows, "max_window_layers": first}
            config = tiny_config(
                **keys, num_kv_attention_heads=2, **({"hidden_size": 50, "head_dim": 8} if odd_heads else {})
            )
            ours = architecture(model_type, config)
            try:
                values = transformers_config_json(ours, model_type)
            except ConfigError:
                continue
            exported += 1
            back = from_hf_config(values, "config.json")
            theirs = architecture(back.model_type, ModelConfig(**back.keys, dtype=back.dtype))  # type: ignore[arg-type]
            assert function(theirs) == function(ours), (keys, values)
    assert exported >= 4


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "linear", "factor": 3.0},
        {"type": "dynamic", "factor": 3.0},
        {"type": "llama3", "factor": 8.0, "low_freq_factor": 2.0, "original_max_position_embeddings": 32},
        {"type": "yarn", "factor": 4.0, "beta_fast": 16.0, "original_max_position_embeddings": 64},
        {"type": "yarn", "factor": 4.0, "attention_factor": 1.5},
    ],
)
def test_rope_scaling_comes_back_as_it_was(scaling: dict[str, Any]) -> None:
    ours = architecture("LLAMA2", tiny_config(rope_base=5e5, rope_scaling=scaling))
    back = from_hf_config(transformers_config_json(ours), "config.json")
    assert function(architecture(back.model_type, ModelConfig(**back.keys, dtype="torch.float32"))) == function(ours)


@pytest.mark.parametrize(
    ("model_type", "keys"),
    [
        ("INTERNLM", {}),
        ("INTERNLM", {"use_dynamic_ntk_rope": True}),
        ("INTERNLM2", {"num_kv_attention_heads": 2, "rope_base": 1e6}),
        ("INTERNLM2", {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "no_bias": False}),
        ("INTERNLM2", {"tie_word_embeddings": True}),
        ("INTERNLM3", {"num_kv_attention_heads": 2, "rope_base": 5e7}),
        ("BAICHUAN2", {}),
        ("QWEN3", {"head_dim": 10}),
    ],
)
def test_published_configs_come_back_as_they_were(model_type: str, keys: dict[str, Any]) -> None:
    ours = architecture(model_type, tiny_config(**keys))
    back = from_hf_config(published_config_json(ours, model_type), "config.json")
    assert back.model_type == model_type
    theirs = architecture(back.model_type, ModelConfig(**back.keys, dtype="torch.float32"))
    assert function(theirs) == function(ours) and theirs.norm_head == ours.norm_head


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "mistrall"}, r"'mistrall' cannot be imported; known: llama, .*Did you mean 'mistral'"),
        ({"model_type": "olmo2"}, r"model_type 'olmo2' cannot be imported; known: llama"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "only causal language models"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        (
            {"rope_scaling": {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0], "long_factor": [1.0]}},
            "rope_type 'longrope'",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7, "mscale_all_dim": 0.7}},
            "rope_parameters.mscale",
        ),
        ({"model_type": "gemma", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "windows must be in all layers from some layer on",
        ),
        ({"model_type": "baichuan", "rms_norm_eps": 1e-6}, "ALiBi"),
        ({"model_type": "internlm2"}, "it lacks rms_norm_eps"),
        ({"hidden_size": "many"}, "hidden_size must be a whole number from 1 to 16,777,216, got 'many'"),
        ({"num_attention_heads": 7}, "transformers cannot read it"),
        ({"sliding_window": 0}, "sliding_window must be a whole number from 1, or null for no window; got 0"),
        ({"model_type": "mistral", "sliding_window": -1}, "or null for no window; got -1"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0: this family's class does not read it"),
        ({"num_local_experts": 8}, "num_local_experts = 8"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -2.0}}, "rope_scaling.*factor"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
    ],
)
def test_what_is_another_function_is_refused_by_name(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        from_hf_config({**LLAMA, **changes}, "folder/config.json")


ODD: tuple[Any, ...] = (None, 0, -1, -0.5, 1.5, "x", "", [], [1], {}, {"a": 1}, True, False, float("nan"), 10**30)


@pytest.mark.parametrize(
    "kind", ["llama", "mistral", "qwen2", "gemma", "internlm", "internlm2", "internlm3", "baichuan", *MIXTURES]
)
def test_odd_values_give_a_model_or_an_error_for_people(kind: str) -> None:
    """Every key of every family with values of other kinds."""
    own = {"internlm": {"rotary": {"base": 10000, "type": "dynamic"}, "bias": True}, "internlm2": {"bias": False}}
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 32
    window = {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1}
    values = {
        **LLAMA,
        "head_dim": 8,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 64,
        "rope_scaling": scaling,
        "rope_theta": 1e4,
        **window,
        "model_type": kind,
    }
    values |= {
        "attention_bias": False,
        "mlp_bias": False,
        "num_key_value_heads": 2,
        "architectures": ["LlamaForCausalLM"],
    }
    values |= {"hidden_act": "gelu_pytorch_tanh"} if kind == "gemma" else {}
    values |= own.get(kind, {})
    if kind in MIXTURES:
        routing = {"num_experts_per_tok": 2, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
        values |= {**MIXTURES[kind], **routing, "router_aux_loss_coef": 0.01, "router_jitter_noise": 0.0}
        kinds = ["full_attention", "sliding_attention"]
        values |= {} if kind == "mixtral" else {"layer_types": kinds[::-1] if kind == "gpt_oss" else kinds}
    from_hf_config(values, "config.json")
    variants = [{**values, key: odd} for key in values for odd in ODD]
    variants += [{**values, "rope_scaling": {**scaling, key: odd}} for key in scaling for odd in ODD]
    variants += [{**values, "rotary": {"base": base, "type": "dynamic", "scaling_factor": base}} for base in ODD]
    accepted = 0
    for variant in variants:
        try:
            keys = from_hf_config(variant, "config.json").keys
        except ConfigError as error:
            assert all(mistake.startswith("config.json: ") for mistake in error.mistakes)
        else:
            ModelConfig.model_validate(keys)
            accepted += 1
    assert 0 < accepted < len(variants)


def test_keys_that_nothing_reads_are_named() -> None:
    changes = {"attention_dropout": 0.1, "use_cache": True, "my_switch": 3, "off": None, "logit_scale": 1.0}
    assert from_hf_config({**LLAMA, **changes}, "config.json").notices == (
        "attention_dropout = 0.1: ignored, as this package trains without dropout",
        "my_switch = 3: ignored, as neither this package nor transformers' class reads it",
    )


def test_all_reasons_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        from_hf_config({**LLAMA, "hidden_act": "relu", "quantization_config": {"bits": 4}}, "folder/config.json")
    assert len(caught.value.mistakes) == 2
    assert all(mistake.startswith("folder/config.json: not supported: ") for mistake in caught.value.mistakes)


def test_old_spellings_of_rotary_keys() -> None:
    old = {**LLAMA, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}, "torch_dtype": "bfloat16"}
    model = from_hf_config(old, "config.json")
    assert model.keys["rope_base"] == 5e5 and model.keys["rope_scaling"] == {"type": "linear", "factor": 2.0}
    assert model.dtype == "torch.bfloat16"


def test_old_gemma_configs_name_the_exact_gelu_and_mean_the_other() -> None:
    assert from_hf_config({**LLAMA, "model_type": "gemma", "hidden_act": "gelu"}, "config.json").model_type == "GEMMA"
