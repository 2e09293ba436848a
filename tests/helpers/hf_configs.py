"""Content of config.json files, and what of an architecture determines the function of a model."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from internlm.config.schema import ModelConfig
from internlm.model.architecture import Architecture
from internlm.model.registry import build_model

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
DEEPSEEK = {
    "num_key_value_heads": 6,
    "num_experts_per_tok": 2,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 0,
}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {**ROUTING, "num_local_experts": 4},
    "qwen2_moe": {**ROUTING, **QWEN, "shared_expert_intermediate_size": 48},
    "qwen3_moe": {**ROUTING, **QWEN},
    "gpt_oss": {**ROUTING, "num_local_experts": 4},
    "olmoe": {**ROUTING, "num_experts": 4},
    "glm4_moe": {
        **ROUTING,
        "n_routed_experts": 4,
        "n_shared_experts": 2,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 0,
        "num_nextn_predict_layers": 0,
    },
    "deepseek_v2": {**DEEPSEEK, "q_lora_rank": None, "topk_method": "greedy", "n_group": None},
    "deepseek_v3": {**DEEPSEEK, "n_group": 2, "topk_group": 2, "rope_interleave": True},
    "kimi_k2": {**DEEPSEEK, "n_group": 1, "topk_group": 1, "scoring_func": "sigmoid"},
}
"""`model_type` of a mixture of experts -> its keys besides those of `LLAMA`."""

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
    values["rope"] = dataclasses.replace(a.rope, interleaved=False, **used)
    return values
