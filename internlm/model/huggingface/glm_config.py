"""GLM-4.5 in a config.json, and in the `model` section."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from internlm.model.architecture import Architecture
from internlm.model.huggingface.mixture_class import MixtureClass, layer_sizes, rotary_factor

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _keys(config: PretrainedConfig, refused: list[str]) -> dict[str, Any]:
    num_layers = config.num_hidden_layers
    dense = list(range(min(config.first_k_dense_replace, num_layers)))
    return {
        **layer_sizes(num_layers, dense, config.intermediate_size, config.moe_intermediate_size, refused),
        "qk_norm": config.use_qk_norm,
        "num_experts": config.n_routed_experts,
        "top_k": config.num_experts_per_tok,
        "num_shared_experts": config.n_shared_experts,
        "moe_type": "Dropless",
        "moe_layer_kwargs": {
            "normalize_expert_weights": config.norm_topk_prob,
            "scoring_func": "sigmoid",
            "routed_scaling_factor": config.routed_scaling_factor,
            "selection_bias": True,
            "n_group": config.n_group,
            "topk_group": config.topk_group,
            "group_score": "top2_sum" if config.n_group > 1 else "max",
        },
    }


def _refused(a: Architecture) -> dict[str, bool]:
    assert a.experts is not None
    experts, form = a.experts, a.experts.form
    return {
        f"scoring_func '{form.scores}' with ungated shared experts": form.scores != "sigmoid",
        "sigmoid scores without a selection bias": not form.has_bias,
        f"groups of experts by '{form.group_score}'": form.num_groups > 1 and form.group_score != "top2_sum",
        "ungated shared experts with o_bias": a.o_bias,
        "ungated shared experts with windows": any(window is not None for window in a.windows),
        "ungated shared experts with dense layers after others": experts.dense_layers
        != frozenset(range(len(experts.dense_layers))),
    }


def _config(a: Architecture, keys: Mapping[str, Any]) -> PretrainedConfig:
    import transformers

    experts = a.experts
    assert experts is not None
    form = experts.form
    rope = {**keys["rope_parameters"], "partial_rotary_factor": rotary_factor(a)}
    return transformers.Glm4MoeConfig(
        **{**keys, "rope_parameters": rope},
        attention_bias=a.qkv_bias,
        use_qk_norm=a.qk_norm,
        moe_intermediate_size=experts.width,
        n_routed_experts=form.num_experts,
        n_shared_experts=experts.shared_width // experts.width,
        num_experts_per_tok=form.top_k,
        norm_topk_prob=form.normalizes,
        routed_scaling_factor=form.scale,
        n_group=form.num_groups,
        topk_group=form.top_groups,
        first_k_dense_replace=len(experts.dense_layers),
        num_mtp_layers=0,
    )


GLM4_MOE = MixtureClass(
    "GLM4_MOE",
    "Glm4MoeConfig",
    _keys,
    _refused,
    _config,
    own_keys=(
        *("partial_rotary_factor", "n_routed_experts", "router_aux_loss_coef", "aux_loss_alpha"),
        "num_nextn_predict_layers",
    ),
)
