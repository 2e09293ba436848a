"""DeepSeek-V2, DeepSeek-V3 and Kimi K2 in a config.json, and in the `model` section.

In files the rotary pairs of latent attention are adjacent rows (`rope_interleave`); `weight_names.py` reorders them for
a model whose pairs are halves.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from internlm.model.architecture import Architecture
from internlm.model.huggingface.mixture_class import MixtureClass, layer_sizes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from internlm.model.moe.router_form import Scores

_CHOICES = {"deepseek_v2": ("greedy", "group_limited_greedy"), "deepseek_v3": ("noaux_tc",)}
"""Class -> accepted values of `topk_method`."""

_NOT_READ = ("scoring_func", "topk_method", "moe_layer_freq", "ep_size", "seq_aux", "aux_loss_alpha")
"""Keys of published config.json files that transformers' classes do not read; `_keys` checks them."""


def _keys(scores: Scores, config: PretrainedConfig, refused: list[str]) -> dict[str, Any]:
    kind, is_v2 = config.model_type, scores == "softmax"
    if config.attention_bias or getattr(config, "mlp_bias", False):
        refused.append(f"attention_bias = {config.attention_bias}, mlp_bias = {getattr(config, 'mlp_bias', False)}")
    if config.num_key_value_heads != config.num_attention_heads:
        refused.append(f"num_key_value_heads = {config.num_key_value_heads} of {config.num_attention_heads} heads")
    if not getattr(config, "rope_interleave", True):
        refused.append("rope_interleave = False")
    rope = config.rope_parameters
    if rope.get("mscale") and not rope.get("mscale_all_dim"):
        refused.append("rope_parameters.mscale without mscale_all_dim, which transformers ignores")
    for key, value in (("scoring_func", scores), ("moe_layer_freq", 1)):
        if getattr(config, key, value) != value:
            refused.append(f"{key} = {getattr(config, key)!r}: transformers' class computes {value!r}")
    method = getattr(config, "topk_method", None)
    if method is not None and method not in _CHOICES.get(kind, _CHOICES["deepseek_v3"]):
        refused.append(f"topk_method = {method!r}")
    has_groups = not is_v2 or method == "group_limited_greedy"
    groups = {"n_group": config.n_group, "topk_group": config.topk_group} if has_groups and config.n_group else {}
    num_layers = config.num_hidden_layers
    dense = list(range(min(config.first_k_dense_replace, num_layers)))
    return {
        **layer_sizes(num_layers, dense, config.intermediate_size, config.moe_intermediate_size, refused),
        **dict.fromkeys(("head_dim", "num_kv_attention_heads", "qkv_bias", "o_bias", "mlp_bias")),
        "q_lora_rank": config.q_lora_rank,
        "kv_lora_rank": config.kv_lora_rank,
        "qk_nope_head_dim": config.qk_nope_head_dim,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "v_head_dim": config.v_head_dim,
        "num_experts": config.n_routed_experts,
        "top_k": config.num_experts_per_tok,
        "num_shared_experts": config.n_shared_experts,
        "moe_type": "Dropless",
        "moe_layer_kwargs": {
            "normalize_expert_weights": False if is_v2 else config.norm_topk_prob,
            "scoring_func": scores,
            "routed_scaling_factor": config.routed_scaling_factor,
            "selection_bias": not is_v2,
            "group_score": "top2_sum" if groups and not is_v2 and config.n_group > 1 else "max",
            **groups,
        },
    }


def _refused(scores: Scores, a: Architecture) -> dict[str, bool]:
    assert a.experts is not None
    experts, form = a.experts, a.experts.form
    group_score = "max" if scores == "softmax" else "top2_sum"
    return {
        "latent attention with windows": any(window is not None for window in a.windows),
        "latent attention with dense layers after others": experts.dense_layers
        != frozenset(range(len(experts.dense_layers))),
        "latent attention without shared experts": not experts.shared_width,
        "latent attention with softmax scores that are normalized": scores == "softmax" and form.normalizes,
        "latent attention with softmax scores and a selection bias": scores == "softmax" and form.has_bias,
        "latent attention with sigmoid scores without a selection bias": scores == "sigmoid" and not form.has_bias,
        f"groups of experts by '{form.group_score}' for {scores} scores": form.num_groups > 1
        and form.group_score != group_score,
        "latent attention with softmax scores and a hidden_size that is not a multiple of the heads": scores
        == "softmax"
        and a.hidden_size % a.num_heads != 0,
    }


def _config(scores: Scores, a: Architecture, keys: Mapping[str, Any]) -> PretrainedConfig:
    import transformers

    experts, shape = a.experts, a.latent
    assert experts is not None and shape is not None
    form = experts.form
    latent = {
        **{key: value for key, value in keys.items() if key != "head_dim"},
        "q_lora_rank": shape.q_rank,
        "kv_lora_rank": shape.kv_rank,
        "qk_nope_head_dim": shape.plain_dim,
        "qk_rope_head_dim": shape.rotary_dim,
        "v_head_dim": shape.value_dim,
        "moe_intermediate_size": experts.width,
        "n_routed_experts": form.num_experts,
        "n_shared_experts": experts.shared_width // experts.width,
        "num_experts_per_tok": form.top_k,
        "norm_topk_prob": form.normalizes,
        "routed_scaling_factor": form.scale,
        "n_group": form.num_groups,
        "topk_group": form.top_groups,
        "first_k_dense_replace": len(experts.dense_layers),
    }
    if scores == "softmax":
        method = "group_limited_greedy" if form.num_groups > 1 else "greedy"
        return transformers.DeepseekV2Config(**latent, topk_method=method)
    return transformers.DeepseekV3Config(**latent, rope_interleave=True, num_mtp_layers=0)


def _class(model_type: str, class_name: str, scores: Scores) -> MixtureClass:
    return MixtureClass(
        model_type,
        class_name,
        partial(_keys, scores),
        partial(_refused, scores),
        partial(_config, scores),
        own_keys=("n_routed_experts", "router_aux_loss_coef", "num_nextn_predict_layers", *_NOT_READ),
    )


DEEPSEEK_CLASSES = {
    "deepseek_v2": _class("DEEPSEEK_V2", "DeepseekV2Config", "softmax"),
    "deepseek_v3": _class("DEEPSEEK_V3", "DeepseekV3Config", "sigmoid"),
    # Published with the code of DeepSeek-V3.
    "kimi_k2": _class("KIMI_K2", "DeepseekV3Config", "sigmoid"),
}
"""`model_type` of config.json -> its class."""
