"""Mixtures of experts in a config.json, and in the `model` section: translation in both directions."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from internlm.model.architecture import Architecture
from internlm.model.huggingface.config_checks import is_whole
from internlm.model.huggingface.deepseek_config import DEEPSEEK_CLASSES
from internlm.model.huggingface.glm_config import GLM4_MOE
from internlm.model.huggingface.gpt_oss_config import GPT_OSS
from internlm.model.huggingface.mixture_class import MixtureClass, layer_sizes, softmax_routing, unlike_softmax_routing
from internlm.model.huggingface.olmoe_config import OLMOE

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CLASSES: dict[str, MixtureClass] = {"glm4_moe": GLM4_MOE, "olmoe": OLMOE, "gpt_oss": GPT_OSS, **DEEPSEEK_CLASSES}
"""`model_type` of config.json -> its class, of those with a file of their own."""

MODEL_TYPES = {
    "mixtral": "MIXTRALMOE",
    "qwen2_moe": "QWEN2MOE",
    "qwen3_moe": "QWEN3MOE",
    **{kind: one.model_type for kind, one in CLASSES.items()},
}
"""`model_type` of config.json -> ours."""

_MOST_EXPERTS = 1 << 16
_MOST_CHANNELS = 1 << 24
_SIZES = {
    "num_experts": (2, _MOST_EXPERTS),
    "num_local_experts": (2, _MOST_EXPERTS),
    "num_experts_per_tok": (1, _MOST_EXPERTS),
    "moe_intermediate_size": (1, _MOST_CHANNELS),
    "shared_expert_intermediate_size": (1, _MOST_CHANNELS),
    "decoder_sparse_step": (1, _MOST_EXPERTS),
    "n_routed_experts": (2, _MOST_EXPERTS),
    "n_shared_experts": (1, _MOST_EXPERTS),
    "n_group": (1, _MOST_EXPERTS),
    "topk_group": (1, _MOST_EXPERTS),
    "first_k_dense_replace": (0, _MOST_EXPERTS),
    "num_nextn_predict_layers": (0, _MOST_EXPERTS),
    **dict.fromkeys(
        ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), (1, _MOST_CHANNELS)
    ),
}
"""Key -> least and largest accepted value."""
_MAY_BE_NULL = ("q_lora_rank", "n_group", "topk_group", "num_nextn_predict_layers")


def expert_mistakes(values: Mapping[str, Any]) -> list[str]:
    """Values of a mixture's config.json with the wrong type or range, one line each."""
    found = [
        f"{key} must be a whole number from {least} to {most:,}, got {values[key]!r}"
        for key, (least, most) in _SIZES.items()
        if key in values
        and not is_whole(values[key], least, most)
        and (values[key] is not None or key not in _MAY_BE_NULL)
    ]
    for key in ("norm_topk_prob", "output_router_logits", "use_qk_norm"):
        if not isinstance(values.get(key, False), bool):
            found.append(f"{key} must be true or false, got {values[key]!r}")
    for key in ("router_jitter_noise", "router_aux_loss_coef", "routed_scaling_factor"):
        value = values.get(key, 0.0)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value >= 0:
            found.append(f"{key} must be a number from 0, got {value!r}")
    layers = values.get("mlp_only_layers")
    if layers is not None and not (isinstance(layers, list) and all(is_whole(layer, 0) for layer in layers)):
        found.append(f"mlp_only_layers must be a list of layer numbers, got {layers!r}")
    both = [values[key] for key in ("num_experts", "num_local_experts") if key in values]
    if len(both) == 2 and both[0] != both[1]:
        found.append(f"num_experts = {both[0]!r} contradicts num_local_experts = {both[1]!r}")
    return found


def expert_keys(kind: str, config: PretrainedConfig, refused: list[str]) -> dict[str, Any]:
    """The keys of the `model` section that describe the experts.

    Args:
        kind: `model_type` of the config.json.
        config: transformers' config.
        refused: receives the name of each feature that is not supported.
    """
    num_experts = getattr(config, "num_local_experts", None) or config.num_experts
    if config.num_experts_per_tok > num_experts:
        refused.append(f"num_experts_per_tok = {config.num_experts_per_tok} of {num_experts} experts")
    if kind in CLASSES:
        return CLASSES[kind].keys(config, refused)
    normalizes, width, num_shared, dense = True, config.intermediate_size, 0, list[int]()
    if kind == "mixtral":
        if config.router_jitter_noise:
            refused.append(f"router_jitter_noise = {config.router_jitter_noise} (noise on the router's input)")
    else:
        normalizes, width = config.norm_topk_prob, config.moe_intermediate_size
        step = config.decoder_sparse_step
        dense = [i for i in range(config.num_hidden_layers) if i in config.mlp_only_layers or (i + 1) % step]
    if kind == "qwen2_moe":
        num_shared, rest = divmod(config.shared_expert_intermediate_size, width)
        if rest:
            refused.append(
                f"shared_expert_intermediate_size = {config.shared_expert_intermediate_size} that is not a multiple of "
                f"moe_intermediate_size = {width}"
            )
    return {
        **layer_sizes(config.num_hidden_layers, dense, config.intermediate_size, width, refused),
        "num_experts": num_experts,
        "top_k": config.num_experts_per_tok,
        "num_shared_experts": num_shared,
        "moe_type": "Dropless",
        "moe_layer_kwargs": softmax_routing(normalizes),
    }


def expert_notices(values: Mapping[str, Any]) -> list[str]:
    """One line for each key of a mixture's config.json that concerns training only."""
    notices = []
    for key in ("router_aux_loss_coef", "aux_loss_alpha"):
        if key in values:
            notices.append(f"{key} = {values[key]!r}: not imported; set loss.moe_loss_coeff, whose default is another")
    if values.get("model_type") == "deepseek_v2" and values.get("norm_topk_prob"):
        notices.append("norm_topk_prob = True: ignored, as transformers' class of DeepSeek-V2 does not read it")
    return notices


def mixture_kind(architecture: Architecture) -> str | None:
    """`model_type` of the class of transformers that computes this model, if any does; None for a dense model."""
    experts = architecture.experts
    if experts is None:
        return None
    if architecture.attention_sinks:
        return "gpt_oss"
    if architecture.norms_whole_projections:
        return "olmoe"
    if architecture.latent is not None:
        return "deepseek_v2" if experts.form.scores == "softmax" else "deepseek_v3"
    if experts.shared_width:
        return "glm4_moe" if experts.shared_mix == "sum" else "qwen2_moe"
    return "qwen3_moe" if architecture.qk_norm else "mixtral"


def unlike_mixtures(architecture: Architecture) -> dict[str, bool]:
    """Reasons why transformers has no class for a mixture of experts -> whether they apply."""
    a, kind = architecture, mixture_kind(architecture)
    assert a.experts is not None
    experts, form = a.experts, a.experts.form
    has_shared = bool(experts.shared_width)
    common = {
        "norm_type 'layernorm'": a.norm_type != "rmsnorm",
        "is_reward": a.is_reward,
        "experts with an activation other than silu": a.activation != "silu" and kind != "gpt_oss",
        "experts with norms times 1 + weight or embeddings times sqrt(hidden_size)": a.unit_offset_norm
        or a.embedding_multiplier != 1.0,
        "mlp_bias with experts": a.mlp_bias,
        "clip_qkv without norms of whole projections": a.clip_qkv is not None and kind != "olmoe",
    }
    if kind in CLASSES:
        return common | CLASSES[kind].refused(a)
    return common | {
        "partial_rotary_factor": a.rope.head_dim != a.head_dim,
        **unlike_softmax_routing(form),
        f"shared experts whose output is mixed by '{experts.shared_mix}'": has_shared
        and experts.shared_mix != "sigmoid",
        "shared experts with q and k norms": has_shared and a.qk_norm,
        "shared experts with o_bias": has_shared and a.o_bias,
        "experts with q and k norms and bias on qkv alone": kind == "qwen3_moe" and a.qkv_bias != a.o_bias,
        "experts with biases of attention, without q and k norms": kind == "mixtral" and (a.qkv_bias or a.o_bias),
        "normalize_expert_weights = False without q and k norms or shared experts": kind == "mixtral"
        and not form.normalizes,
        "dense layers without q and k norms or shared experts": kind == "mixtral" and bool(experts.dense_layers),
        "sliding_window_pattern": has_gaps_in_windows(a),
        "windows in some layers": kind != "qwen2_moe" and len(set(a.windows)) > 1,
    }


def has_gaps_in_windows(a: Architecture) -> bool:
    """Whether a layer with full attention follows one with a window."""
    return any(before is not None and after is None for before, after in itertools.pairwise(a.windows))


def mixture_config(architecture: Architecture, keys: Mapping[str, Any]) -> PretrainedConfig:
    """The config of the class of transformers that computes a mixture of experts.

    Args:
        architecture: one for which no reason of `unlike_mixtures` applies.
        keys: of the config that dense models have, too.
    """
    import transformers

    a, experts = architecture, architecture.experts
    assert experts is not None
    window = next((window for window in a.windows if window is not None), None)
    routing: dict[str, Any] = {"num_experts_per_tok": experts.form.top_k, "output_router_logits": False}
    qwen: dict[str, Any] = {
        "moe_intermediate_size": experts.width,
        "norm_topk_prob": experts.form.normalizes,
        "decoder_sparse_step": 1,
        "mlp_only_layers": sorted(experts.dense_layers),
        "use_sliding_window": window is not None,
    }
    kind, num_experts = mixture_kind(a), experts.form.num_experts
    if kind in CLASSES:
        return CLASSES[kind].config(a, keys)
    if kind == "mixtral":
        return transformers.MixtralConfig(**keys, **routing, num_local_experts=num_experts, sliding_window=window)
    if kind == "qwen3_moe":
        return transformers.Qwen3MoeConfig(
            **keys, **routing, **qwen, num_experts=num_experts, sliding_window=window, attention_bias=a.qkv_bias
        )
    return transformers.Qwen2MoeConfig(
        **keys,
        **routing,
        **qwen,
        num_experts=num_experts,
        shared_expert_intermediate_size=experts.shared_width,
        qkv_bias=a.qkv_bias,
        sliding_window=window,
        max_window_layers=sum(window is None for window in a.windows),
        layer_types=["full_attention" if window is None else "sliding_attention" for window in a.windows],
    )
