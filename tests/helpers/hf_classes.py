"""Tiny configs of transformers' decoder classes, with windows, rotary scalings and experts that tiny inputs reach."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

VOCAB, HIDDEN, LAYERS, HEADS, HEAD_DIM = 96, 32, 4, 4, 8

_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_KINDS = ["sliding_attention", "full_attention"] * 2
_WINDOW = {"sliding_window": 4, "layer_types": _KINDS}
_EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
_GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": 128,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

TINY: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    "qwen3": {},
    "mistral": {"sliding_window": 4},
    "gemma": {},
    "gemma2": dict(query_pre_attn_scalar=8, **_WINDOW),
    "gemma3_text": dict(query_pre_attn_scalar=8, **_WINDOW),
    "phi": {},
    "phi3": {"original_max_position_embeddings": 128},
    "olmo2": {},
    "olmo3": _WINDOW,
    "exaone4": _WINDOW,
    "glm4": {},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0], "layer_types": ["full_attention"] * LAYERS},
    "starcoder2": {"embedding_dropout": 0.0, "residual_dropout": 0.0, "attention_dropout": 0.0},
    "gpt_neox": {"hidden_dropout": 0.0, "attention_dropout": 0.0},
    "gpt2": _GPT2,
    "granite": {
        "embedding_multiplier": 12.0,
        "logits_scaling": 8.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.0156,
    },
    "cohere": {},
    "cohere2": _WINDOW,
    "nemotron": {},
    "stablelm": {},
    "apertus": {},
    "mixtral": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "gpt_oss": {**_EXPERTS, **_WINDOW},
    "mamba": {"state_size": 8, "time_step_rank": 4},
    "bloom": {"n_layer": LAYERS, "n_head": HEADS},
}
"""`model_type` of transformers -> what differs from the common shape."""

_WITHOUT = {
    "gpt2": _SHAPE.keys(),
    "gpt_neox": {"head_dim", "num_key_value_heads"},
    "bloom": {"head_dim", "num_key_value_heads"},
    "mamba": {"head_dim", "num_key_value_heads", "num_attention_heads"},
    "phi": {"head_dim"},
    "stablelm": {"head_dim"},
}


def tiny_config(family: str, **changes: Any) -> Any:
    """A config object of transformers."""
    from transformers import CONFIG_MAPPING

    shape = {name: value for name, value in _SHAPE.items() if name not in _WITHOUT.get(family, ())}
    return CONFIG_MAPPING[family](**{**shape, **TINY.get(family, {}), **changes})


def tiny_class(family: str, **changes: Any) -> nn.Module:
    """A `...ForCausalLM` with eager attention and weights so large that every part of it changes the logits."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = tiny_config(family, **changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0.0, 0.15, generator=generator)
        else:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model
