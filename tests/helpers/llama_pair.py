"""A small Llama of ours and transformers' own, with the same weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.model import tiny_config, tiny_model


def llama_pair() -> tuple[Any, LlamaForCausalLM]:
    """Both in evaluation mode; with large weights, so that the choices are clear."""
    model = tiny_model("LLAMA2", seed=1, num_kv_attention_heads=2)
    config = tiny_config(num_kv_attention_heads=2)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.ffn_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=2,
            rms_norm_eps=config.layer_norm_epsilon,
            max_position_embeddings=512,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
    names = {
        "tok_embeddings": "model.embed_tokens",
        "output": "lm_head",
        "norm": "model.norm",
        "attention.w": "self_attn.",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w3": "mlp.up_proj",
        "feed_forward.w2": "mlp.down_proj",
    }
    state = {}
    for name, value in model.state_dict().items():
        prefix, key = "", name
        if name.startswith("layers."):
            prefix, key = "model." + ".".join(name.split(".")[:2]) + ".", name.split(".", 2)[2]
        if key.startswith("attention.w"):
            key = f"self_attn.{key.split('.')[1].removeprefix('w')}_proj.weight"
        else:
            key = next(names[ours] + key.removeprefix(ours) for ours in names if key.startswith(ours))
        state[prefix + key] = value
    theirs.load_state_dict(state)
    return model.eval(), theirs.eval()
