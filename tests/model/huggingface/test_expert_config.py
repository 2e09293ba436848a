"""Mixtures of experts in configs of Hugging Face, in our words, and back."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from helpers.hf_configs import LLAMA, MIXTURES, architecture, function
from helpers.model import tiny_config

from internlm.config.schema import ModelConfig
from internlm.model.huggingface.from_config import from_hf_config
from internlm.model.huggingface.to_config import transformers_config_json
from internlm.utils.errors import ConfigError

EXPERTS = {"num_experts": 4, "top_k": 2, "moe_type": "Dropless"}

ROUTERS = {"GLM4_MOE": {"scoring_func": "sigmoid", "selection_bias": True}}

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
    "mlp_only_layers": ((), (1,)),
}


@pytest.mark.parametrize(
    ("model_type", "exportable"),
    # Embedding and number of experts per token: 4 times each. As Mixtral: 2 windows. As Qwen3: 2 windows, 2 biases, 2
    # weightings. As Qwen2, where a sigmoid mixes the output of shared experts: 3 windows, 2 biases, 2 weightings. These
    # two with and without dense layers. As GLM-4.5: 2 biases, with and without q and k norms, 2 weightings.
    # As OLMoE: 2 biases, 2 weightings, and without its norms as Mixtral. As gpt-oss: 3 windows, 2 biases.
    [
        ("MIXTRALMOE", 72),
        ("INTERNLM_MoE", 72),
        ("QWEN2MOE", 168),
        ("QWEN3MOE", 168),
        ("GLM4_MOE", 32),
        ("OLMOE", 24),
        ("GPT_OSS", 24),
    ],
)
def test_every_mixture_that_is_exported_comes_back_as_it_was(model_type: str, exportable: int) -> None:
    exported = 0
    for choice in itertools.product(*MIXTURE_CHOICES.values()):
        keys: dict[str, Any] = dict(zip(MIXTURE_CHOICES, choice, strict=True))
        first_window, normalizes = keys.pop("first_window"), keys.pop("normalizes")
        keys |= {"use_sliding_window": first_window is not None, "max_window_layers": first_window or 0}
        keys["moe_layer_kwargs"] = {"normalize_expert_weights": normalizes, **ROUTERS.get(model_type, {})}
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


UNGATED = ("glm4_moe", "deepseek_v2", "deepseek_v3", "kimi_k2")


@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_in_our_words(kind: str) -> None:
    values = {**LLAMA, **MIXTURES[kind], "model_type": kind, "num_experts_per_tok": 3, "router_aux_loss_coef": 0.02}
    model = from_hf_config(values, "config.json")
    keys = {name: model.keys[name] for name in ("num_experts", "top_k", "moe_type", "intermediate_size")}
    width = 88 if kind in ("mixtral", "olmoe", "gpt_oss") else 24
    assert keys == {"num_experts": 4, "top_k": 3, "moe_type": "Dropless", "intermediate_size": width}
    assert model.keys.get("num_shared_experts", 0) == (2 if kind in ("qwen2_moe", *UNGATED) else 0)
    # The default of transformers' Qwen classes.
    assert model.keys["moe_layer_kwargs"]["normalize_expert_weights"] == (
        kind in ("mixtral", "gpt_oss", "glm4_moe", "deepseek_v3", "kimi_k2")
    )
    assert model.notices == (
        "router_aux_loss_coef = 0.02: not imported; set loss.moe_loss_coeff, whose default is another",
    )
    experts = architecture(model.model_type, ModelConfig(**model.keys)).experts
    assert experts is not None and experts.width == width
    assert experts.shared_width == (48 if kind in ("qwen2_moe", *UNGATED) else 0)


@pytest.mark.parametrize(
    ("changes", "dense"),
    [
        ({"mlp_only_layers": [2, 0]}, {0, 2}),
        ({"decoder_sparse_step": 3}, {0, 1, 3}),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, {0, 2, 3}),
    ],
)
def test_layers_without_experts(changes: dict[str, Any], dense: set[int]) -> None:
    values = {**LLAMA, **MIXTURES["qwen3_moe"], "model_type": "qwen3_moe", "num_hidden_layers": 4, **changes}
    model = from_hf_config(values, "config.json")
    ours = architecture(model.model_type, ModelConfig(**model.keys))
    assert ours.experts is not None
    assert (set(ours.experts.dense_layers), ours.intermediate_size, ours.experts.width) == (dense, 88, 24)
    written = transformers_config_json(ours, "QWEN3MOE")
    assert (written["intermediate_size"], written["moe_intermediate_size"]) == (88, 24)


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


WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1"),
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok = 5 of 4 experts"),
        ("mixtral", {"n_shared_experts": 1}, "n_shared_experts = 1: this family's class does not read it"),
        ("mixtral", {"first_k_dense_replace": 1}, "first_k_dense_replace = 1: this family's class does not read it"),
        ("mixtral", {"moe_intermediate_size": 24}, "moe_intermediate_size = 24: this family's class does not read it"),
        ("qwen2_moe", {"decoder_sparse_step": 3}, "no layer with experts, of 2 layers"),
        ("qwen3_moe", {"mlp_only_layers": [0, 1]}, "no layer with experts, of 2 layers"),
        ("glm4_moe", {"first_k_dense_replace": 3}, "no layer with experts, of 2 layers"),
        ("gpt_oss", {"layer_types": ["full_attention", "sliding_attention"]}, "must be in every n-th layer"),
        ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit = 5.0"),
        ("glm4_moe", {"n_group": 3}, r"config.json: .*\bn_group\b(?!.*model\.)"),
        ("deepseek_v3", {"n_group": 2, "topk_group": 3}, r"config.json: .*\btopk_group\b(?!.*model\.)"),
        ("glm4_moe", {"n_shared_experts": 0}, "n_shared_experts must be a whole number from 1"),
        (
            "qwen2_moe",
            {"shared_expert_intermediate_size": 40},
            "shared_expert_intermediate_size = 40 that is not a multiple of moe_intermediate_size = 24",
        ),
        ("qwen2_moe", {"num_local_experts": 8}, "num_experts = 4 contradicts num_local_experts = 8"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size must be a whole number"),
        ("qwen3_moe", {"num_experts": 1}, "num_experts must be a whole number from 2 to 65,536, got 1"),
        ("qwen3_moe", {"norm_topk_prob": 1}, "norm_topk_prob must be true or false, got 1"),
        ("qwen3_moe", {"router_aux_loss_coef": "x"}, "router_aux_loss_coef must be a number from 0, got 'x'"),
        ("qwen3_moe", {"mlp_only_layers": "0"}, "mlp_only_layers must be a list of layer numbers, got '0'"),
        # Windows alternate.
        ("qwen2_moe", WINDOW, "windows must be in all layers from some layer on"),
    ],
)
def test_mixtures_that_are_not_supported_are_refused_by_name(kind: str, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        from_hf_config({**LLAMA, **MIXTURES[kind], "model_type": kind, **changes}, "folder/config.json")
