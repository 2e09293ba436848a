"""gpt-oss in a config.json, and in the `model` section."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from internlm.model.architecture import Architecture
from internlm.model.huggingface.mixture_class import MixtureClass, softmax_routing, unlike_softmax_routing
from internlm.model.ops.gated_activation import CLAMP_LIMIT, SIGMOID_GAIN

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_UNUSED_WINDOW = 128
_OWN_KEYS = ("experts_per_token", "quantization_config")


def _keys(config: PretrainedConfig, refused: list[str]) -> dict[str, Any]:
    if (config.swiglu_alpha, config.swiglu_limit) != (SIGMOID_GAIN, CLAMP_LIMIT):
        refused.append(f"swiglu_alpha = {config.swiglu_alpha}, swiglu_limit = {config.swiglu_limit}")
    return {
        "num_experts": config.num_local_experts,
        "top_k": config.num_experts_per_tok,
        "moe_type": "Dropless",
        "moe_layer_kwargs": softmax_routing(True),
    }


def _refused(a: Architecture) -> dict[str, bool]:
    assert a.experts is not None
    experts, form = a.experts, a.experts.form
    what = "experts of gpt-oss"
    return {
        **unlike_softmax_routing(form),
        "normalize_expert_weights = False": not form.normalizes,
        f"{what} with shared experts": bool(experts.shared_width),
        f"{what} with dense layers": bool(experts.dense_layers),
        f"{what} with bias on qkv alone": a.qkv_bias != a.o_bias,
        f"{what} with q and k norms": a.qk_norm,
        f"{what} with max_window_layers": a.windows[0] is None and any(window is not None for window in a.windows),
        "partial_rotary_factor": a.rope.head_dim != a.head_dim,
    }


def _config(a: Architecture, keys: Mapping[str, Any]) -> PretrainedConfig:
    import transformers

    assert a.experts is not None
    form = a.experts.form
    # The class needs the size of a window even if no layer has one.
    window = next((window for window in a.windows if window is not None), _UNUSED_WINDOW)
    return transformers.GptOssConfig(
        **keys,
        attention_bias=a.qkv_bias,
        num_local_experts=form.num_experts,
        num_experts_per_tok=form.top_k,
        sliding_window=window,
        layer_types=["full_attention" if window is None else "sliding_attention" for window in a.windows],
    )


GPT_OSS = MixtureClass("GPT_OSS", "GptOssConfig", _keys, _refused, _config, own_keys=_OWN_KEYS)
