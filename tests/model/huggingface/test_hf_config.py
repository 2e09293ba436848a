"""Configs of Hugging Face in our words and back."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from helpers.model import tiny_config

from internlm.config.schema import ModelConfig
from internlm.model.architecture import Architecture
from internlm.model.huggingface.from_config import from_hf_config
from internlm.model.huggingface.to_config import published_config_json, transformers_config_json
from internlm.model.registry import build_model
from internlm.utils.errors import ConfigError

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
}

ROUTING = {"num_key_value_heads": 2, "num_experts_per_tok": 2}
QWEN = {"num_experts": 4, "moe_intermediate_size": 24}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {**ROUTING, "num_local_experts": 4},
    "qwen2_moe": {**ROUTING, **QWEN, "shared_expert_intermediate_size": 48},
    "qwen3_moe": {**ROUTING, **QWEN},
}
"""`model_type` of a mixture of experts -> its keys besides those of `LLAMA`."""

EXPERTS = {"num_experts": 4, "top_k": 2, "moe_type": "Dropless"}

# What does not change the function: how weights are laid out, how they came to be, how they are computed.
INDIFFERENT = (
    "fused_qkv", "fused_gate_up", "init", "attention_backend", "use_flash_attn", "fused_kernels", "residual_in_fp32",
    "save_policies", "embed_grad_scale", "norm_dtype", "norm_head",
)  # fmt: skip


def architecture(model_type: str, config: ModelConfig) -> Architecture:
    with torch.device("meta"):
        return build_model(model_type, config).architecture  # type: ignore[return-value]


def function(a: Architecture) -> dict[str, Any]:
    values = {field.name: getattr(a, field.name) for field in dataclasses.fields(a) if field.name not in INDIFFERENT}
    # A default rope does not look at the length of pretraining.
    used = {} if a.rope.rope_type in ("llama3", "yarn", "dynamic") else {"max_positions": 0, "factor": 1.0}
    values["layer_kinds"] = {number: kind.name for number, kind in a.layer_kinds.items()}
    values["rope"] = dataclasses.replace(a.rope, interleaved=False, **used)
    return values


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


MIXTURE_CHOICES: dict[str, tuple[Any, ...]] = {
    "num_shared_experts": (0, 3),
    "qkv_bias": (False, True),
    "o_bias": (False, True),
    "mlp_bias": (False, True),
    "qk_norm": (False, True),
    "tie_word_embeddings": (False, True),
    "normalizes": (False, True),
    "first_window": (None, 0, 1),
    "top_k": (1, 3),
}


@pytest.mark.parametrize(
    ("model_type", "exportable"),
    # Embedding and number of experts per token: 4 times each. As Mixtral: 2 windows. As Qwen3: 2 windows, 2 biases, 2
    # weightings. As Qwen2, where a sigmoid mixes the output of shared experts: 3 windows, 2 biases, 2 weightings.
    [("MIXTRALMOE", 40), ("INTERNLM_MoE", 40), ("QWEN2MOE", 88), ("QWEN3MOE", 88)],
)
def test_every_mixture_that_is_exported_comes_back_as_it_was(model_type: str, exportable: int) -> None:
    exported = 0
    for choice in itertools.product(*MIXTURE_CHOICES.values()):
        keys: dict[str, Any] = dict(zip(MIXTURE_CHOICES, choice, strict=True))
        first_window, normalizes = keys.pop("first_window"), keys.pop("normalizes")
        keys |= {"use_sliding_window": first_window is not None, "max_window_layers": first_window or 0}
        keys["moe_layer_kwargs"] = {"normalize_expert_weights": normalizes}
        config = tiny_config(**{**EXPERTS, **keys}, sliding_window=None if first_window is None else 5)
        ours = architecture(model_type, config)
        try:
            values = transformers_config_json(ours, model_type)
        except ConfigError:
            continue
        exported += 1
        back = from_hf_config(values, "config.json")
        theirs = architecture(back.model_type, ModelConfig(**back.keys, dtype=back.dtype))  # type: ignore[arg-type]
        assert function(theirs) == function(ours), (keys, values)
    assert exported == exportable


@pytest.mark.parametrize(
    ("model_type", "keys", "reason"),
    [
        (
            "INTERNLM_MoE",
            {"num_shared_experts": 1},
            r"this mixture of experts \(INTERNLM_MoE\): shared experts whose output is mixed by 'softmax', "
            "shared experts with o_bias",
        ),
        ("INTERNLM_MoE", {}, r"\(INTERNLM_MoE\): experts with biases of attention, without q and k norms"),
        ("MIXTRALMOE", {"moe_layer_kwargs": {"scoring_func": "sigmoid"}}, "scoring_func 'sigmoid'"),
        ("QWEN3MOE", {"moe_layer_kwargs": {"routed_scaling_factor": 2.5}}, "routed_scaling_factor"),
        ("QWEN3MOE", {"moe_layer_kwargs": {"n_group": 2, "topk_group": 1}}, "groups of experts"),
        ("QWEN3MOE", {"norm_type": "layernorm"}, "layernorm"),
        ("MIXTRALMOE", {"is_reward": True}, "is_reward"),
    ],
)
def test_mixtures_without_a_class_are_refused_with_the_reason(
    model_type: str, keys: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        transformers_config_json(architecture(model_type, tiny_config(**{**EXPERTS, **keys})), model_type)


@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_in_our_words(kind: str) -> None:
    values = {**LLAMA, **MIXTURES[kind], "model_type": kind, "num_experts_per_tok": 3, "router_aux_loss_coef": 0.02}
    model = from_hf_config(values, "config.json")
    keys = {name: model.keys[name] for name in ("num_experts", "top_k", "moe_type", "intermediate_size")}
    width = 88 if kind == "mixtral" else 24
    assert keys == {"num_experts": 4, "top_k": 3, "moe_type": "Dropless", "intermediate_size": width}
    assert model.keys["num_shared_experts"] == (2 if kind == "qwen2_moe" else 0)
    # The default of transformers' Qwen classes.
    assert model.keys["moe_layer_kwargs"]["normalize_expert_weights"] == (kind == "mixtral")
    assert model.notices == (
        "router_aux_loss_coef = 0.02: not imported; set loss.moe_loss_coeff, whose default is another",
    )
    experts = architecture(model.model_type, ModelConfig(**model.keys)).experts
    assert experts is not None and experts.width == width
    assert experts.shared_width == (48 if kind == "qwen2_moe" else 0)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_both_names_of_the_number_of_experts(kind: str) -> None:
    values = {**LLAMA, **MIXTURES[kind], "model_type": kind}
    values.pop("num_local_experts", None), values.pop("num_experts", None)
    for names in (("num_experts",), ("num_local_experts",), ("num_experts", "num_local_experts")):
        assert from_hf_config({**values, **dict.fromkeys(names, 6)}, "config.json").keys["num_experts"] == 6
    with pytest.raises(ConfigError, match="num_experts = 6 contradicts num_local_experts = 8"):
        from_hf_config({**values, "num_experts": 6, "num_local_experts": 8}, "config.json")


def test_an_exported_qwen3_moe_has_both_names_of_the_number_of_experts() -> None:
    """Version 4 of transformers reads only one of them, version 5 writes only the other."""
    values = transformers_config_json(architecture("QWEN3MOE", tiny_config(**EXPERTS)), "QWEN3MOE")
    assert values["num_experts"] == values["num_local_experts"] == 4


def test_qwen2_moe_without_windows_has_a_window_of_zero() -> None:
    """As transformers writes it."""
    values = {**LLAMA, **MIXTURES["qwen2_moe"], "model_type": "qwen2_moe", "sliding_window": 0}
    assert "sliding_window" not in from_hf_config({**values, "use_sliding_window": False}, "config.json").keys
    with pytest.raises(ConfigError, match="sliding_window must be a whole number from 1"):
        from_hf_config({**values, "use_sliding_window": True}, "config.json")


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
        ({"model_type": "olmoe"}, r"model_type 'olmoe' cannot be imported; known: llama"),
        ({**MIXTURES["mixtral"], "model_type": "mixtral", "router_jitter_noise": 0.1}, "router_jitter_noise = 0.1"),
        (
            {**MIXTURES["mixtral"], "model_type": "mixtral", "num_experts_per_tok": 5},
            "num_experts_per_tok = 5 of 4 exp",
        ),
        (
            {**MIXTURES["mixtral"], "model_type": "mixtral", "n_shared_experts": 1},
            "n_shared_experts = 1: this family's",
        ),
        ({**MIXTURES["qwen2_moe"], "model_type": "qwen2_moe", "decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
        ({**MIXTURES["qwen3_moe"], "model_type": "qwen3_moe", "mlp_only_layers": [0]}, r"mlp_only_layers = \[0\]"),
        (
            {**MIXTURES["qwen2_moe"], "model_type": "qwen2_moe", "shared_expert_intermediate_size": 40},
            "shared_expert_intermediate_size = 40 that is not a multiple of moe_intermediate_size = 24",
        ),
        ({**MIXTURES["qwen2_moe"], "model_type": "qwen2_moe", "num_local_experts": 8}, "num_local_experts = 8"),
        (
            {**MIXTURES["qwen3_moe"], "model_type": "qwen3_moe", "num_experts": 1},
            "num_experts must be a whole .* from 2",
        ),
        (
            {
                **MIXTURES["qwen2_moe"],
                "model_type": "qwen2_moe",
                "use_sliding_window": True,
                "sliding_window": 4,
                "max_window_layers": 2,
            },
            "windows must be in all layers from some layer on",
        ),
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
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, "rope_parameters.truncate"),
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
        values |= {} if kind == "mixtral" else {"layer_types": ["full_attention", "sliding_attention"]}
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
