"""Tiny models of InternEvo's families, for writing checkpoints in its format."""

from __future__ import annotations

from typing import Any

import torch

from helpers.model import tiny_model

SECTION: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_layers": 4,
    "num_attention_heads": 8,
    "intermediate_size": 48,
    "dtype": torch.bfloat16,
    "qk_interleaved": False,
    "checkpoint": False,
    "parallel_output": True,
    "apply_post_layer_norm": False,
}
GQA = {"num_kv_attention_heads": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "INTERNLM": {},
    "INTERNLM2": GQA,
    "INTERNLM3": GQA,
    "LLAMA2": GQA,
    "QWEN2": GQA,
    "BAICHUAN2": {"norm_head": True},
    "GEMMA": {**GQA, "head_dim": 8, "add_unit_offset": True, "tie_word_embeddings": False},
    "MISTRAL": {**GQA, "sliding_window": 16},
}
EXPERTS = {"num_experts": 4, "top_k": 2, "moe_type": "Dropless"}
MIXTURES: dict[str, dict[str, Any]] = {
    "INTERNLM_MoE": {**EXPERTS, "num_shared_experts": 1},
    "MIXTRALMOE": {**GQA, **EXPERTS},
    "QWEN2MOE": {**GQA, **EXPERTS, "num_shared_experts": 2},
    "QWEN3MOE": {**GQA, **EXPERTS},
}


def model_of(model_type: str, section: dict[str, Any]) -> Any:
    """The model, with values that no other weight of it has: biases and norms are not all zero or one."""
    values = {name: value for name, value in section.items() if name != "num_chunks"}
    model = tiny_model(model_type, **values)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def section_of(model_type: str, **changes: Any) -> dict[str, Any]:
    return {**SECTION, **(FAMILIES | MIXTURES)[model_type], **changes}
