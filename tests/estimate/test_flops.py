"""FLOPs of a token against published numbers and against torch's own counter."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.model import tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from internlm.estimate.dimensions import ModelDimensions
from internlm.estimate.flops import attention_flops_per_token, flops_per_token, peak_flops

LLAMA_3_1_8B = ModelDimensions(
    num_layers=32,
    hidden_size=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14336,
    vocab_size=128256,
)


@pytest.mark.parametrize("convention, published", [("full", 57.9), ("causal", 51.5)])
def test_llama_8b_equals_the_published_numbers(convention, published):
    assert round(flops_per_token(LLAMA_3_1_8B, 8192, convention) / 1e9, 1) == published


def test_causal_convention_with_windows_counts_the_keys_each_query_sees():
    seq_len, windows = 256, (None, 32, 1000)
    dimensions = ModelDimensions(3, 48, 4, 2, 16, 80, 101, windows=windows)
    without_attention = 6 * dimensions.gemm_parameters
    pairs = sum(min(query + 1, window or seq_len) for window in windows for query in range(seq_len))
    # Half of a square counts half of its diagonal: half a key less for each query of the triangle.
    pairs -= 0.5 * (256 + 32 + 256)
    counted = flops_per_token(dimensions, seq_len, "causal") - without_attention
    assert counted == pytest.approx(12 * 4 * 16 * pairs / seq_len, rel=1e-12)
    counted = flops_per_token(dimensions, seq_len, "full") - without_attention
    assert counted == 12 * 4 * 16 * (256 + 32 + 256)


def test_dimensions_of_a_decoder():
    model = tiny_model("MISTRAL", num_kv_attention_heads=2, sliding_window=16, num_layers=3)
    dimensions = ModelDimensions.of(model.architecture)
    weights = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 2)
    assert dimensions.gemm_parameters == weights - model.tok_embeddings.weight.numel()
    assert dimensions.windows == (16, 16, 16)


def test_dense_layers_of_a_mixture():
    keys = {"num_experts": 3, "top_k": 3, "moe_type": "Dropless", "num_layers": 3, "intermediate_size": 56}
    model = tiny_model("QWEN3MOE", **keys, moe_intermediate_size=24, first_k_dense_replace=1)
    weights = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)
    dimensions = ModelDimensions.of(model.architecture)
    assert dimensions.gemm_parameters == weights - model.tok_embeddings.weight.numel()


@pytest.mark.parametrize("q_rank", [24, None])
def test_flops_of_latent_attention(q_rank):
    sizes = {"kv_lora_rank": 20, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12}
    model = tiny_model("DEEPSEEK_V2", num_kv_attention_heads=None, head_dim=None, q_lora_rank=q_rank, **sizes)
    dimensions = ModelDimensions.of(model.architecture)
    weights = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 2)
    assert dimensions.gemm_parameters == weights - model.tok_embeddings.weight.numel()
    per_key = 2 * 2 * dimensions.num_heads * 12
    assert attention_flops_per_token(dimensions, 16, None, "full") == per_key * 16
    narrow = dataclasses.replace(dimensions, latent=dataclasses.replace(model.architecture.latent, value_dim=6))
    assert attention_flops_per_token(narrow, 16, None, "full") == per_key * 16 * 3 / 4


def test_full_convention_equals_torch_flop_counter():
    dimensions = ModelDimensions(
        num_layers=3, hidden_size=48, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=80, vocab_size=101
    )
    config = LlamaConfig(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=80,
        vocab_size=101,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    batch, seq_len = 2, 24
    tokens = torch.randint(101, (batch, seq_len))
    model = LlamaForCausalLM(config)
    # A trainable input makes the backward pass compute the gradient of the first layer's input too.
    hidden = model.model.embed_tokens(tokens)
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=hidden).logits.sum().backward()
    assert counter.get_total_flops() == flops_per_token(dimensions, seq_len, "full") * batch * seq_len


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A800-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H20", 148.0),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L4", 121.0),
    ],
)
def test_datasheet_peak(name, tflops):
    assert peak_flops(name, torch.bfloat16) == pytest.approx(tflops * 1e12)


def test_no_peak_is_made_up():
    assert peak_flops("Intel(R) Xeon(R) Platinum 8481C", torch.bfloat16) is None
    assert peak_flops("NVIDIA H100X", torch.bfloat16) is None
    assert peak_flops("NVIDIA H100 80GB HBM3", torch.float32) is None
