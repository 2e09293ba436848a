"""OLMoE in a config.json, and in the `model` section."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from internlm.model.architecture import Architecture
from internlm.model.huggingface.mixture_class import MixtureClass, softmax_routing, unlike_softmax_routing

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _keys(config: PretrainedConfig, refused: list[str]) -> dict[str, Any]:
    if config.hidden_size % config.num_attention_heads:
        refused.append("a hidden_size that is not a multiple of num_attention_heads")
    if config.clip_qkv is not None and not config.clip_qkv > 0:
        refused.append(f"clip_qkv = {config.clip_qkv}")
    return {
        "qk_norm": True,
        "clip_qkv": config.clip_qkv,
        "num_experts": config.num_experts,
        "top_k": config.num_experts_per_tok,
        "moe_type": "Dropless",
        "moe_layer_kwargs": softmax_routing(config.norm_topk_prob),
    }


def _refused(a: Architecture) -> dict[str, bool]:
    assert a.experts is not None
    experts, form = a.experts, a.experts.form
    what = "norms of whole projections"
    return {
        **unlike_softmax_routing(form),
        f"{what} with shared experts": bool(experts.shared_width),
        f"{what} with dense layers": bool(experts.dense_layers),
        f"{what} with bias on qkv alone": a.qkv_bias != a.o_bias,
        f"{what} with windows": any(window is not None for window in a.windows),
        f"{what} with a head_dim other than hidden_size / heads": a.head_dim * a.num_heads != a.hidden_size,
        "partial_rotary_factor": a.rope.head_dim != a.head_dim,
    }


def _config(a: Architecture, keys: Mapping[str, Any]) -> PretrainedConfig:
    import transformers

    assert a.experts is not None
    form = a.experts.form
    return transformers.OlmoeConfig(
        **{name: value for name, value in keys.items() if name != "head_dim"},
        attention_bias=a.qkv_bias,
        clip_qkv=a.clip_qkv,
        num_experts=form.num_experts,
        num_experts_per_tok=form.top_k,
        norm_topk_prob=form.normalizes,
    )


OLMOE = MixtureClass("OLMOE", "OlmoeConfig", _keys, _refused, _config)
