"""A Llama of 12 layers x 768 with random weights, as our model and as that of transformers."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from internlm.config.schema import ModelConfig
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.parallelize import parallelize
from internlm.model.registry import build_model

VOCAB = 32000
_HIDDEN, _FFN, _LAYERS, _HEADS, _KV_HEADS = 768, 2048, 12, 12, 4


def llama_pair(dtype: str, device: str = "cpu") -> tuple[Any, LlamaForCausalLM]:
    """(ours, theirs), in evaluation mode; the weights differ.

    Args:
        dtype: such as "bfloat16".
        device: of the weights.
    """
    config = ModelConfig(
        vocab_size=VOCAB,
        hidden_size=_HIDDEN,
        num_layers=_LAYERS,
        num_attention_heads=_HEADS,
        num_kv_attention_heads=_KV_HEADS,
        intermediate_size=_FFN,
        dtype=f"torch.{dtype}",
    )
    with torch.device("meta"):
        ours: Any = build_model("LLAMA2", config)
    parallelize(ours, ParallelContext.create(device=device), seed=1)
    shape = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=_HIDDEN,
        intermediate_size=_FFN,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        num_key_value_heads=_KV_HEADS,
        bos_token_id=None,
        eos_token_id=None,
    )
    return ours.eval(), LlamaForCausalLM(shape).to(device, getattr(torch, dtype)).eval()
