"""Every family against transformers: the same weights give the same logits and the same gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers.model import LATENT, tiny_model
from torch import Tensor, nn
from torch.nn import functional as F

from internlm.data.packing.collate import to_micro_batch
from internlm.data.packing.document_slice import make_slice
from internlm.data.packing.sample import concatenate_slices, stack_slices
from internlm.model.huggingface.to_config import hf_config
from internlm.model.huggingface.weight_names import from_hf, to_hf
from internlm.model.ops.attention.causal_attention import VarlenMetadata
from internlm.model.ops.cross_entropy import linear_cross_entropy

GQA = {"num_kv_attention_heads": 2}
EXPERTS = {"num_experts": 5, "top_k": 2, "moe_type": "Dropless", "intermediate_size": 24}
DENSE_FIRST = {"first_k_dense_replace": 1, "intermediate_size": 40, "moe_intermediate_size": 24}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"max_position_embeddings": 16}

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    # name: (model_type, transformers class, keys)
    "internlm": ("INTERNLM", "LlamaForCausalLM", {}),
    "internlm2": ("INTERNLM2", "LlamaForCausalLM", GQA),
    "internlm2-fused-ffn-interleaved": (
        "INTERNLM2",
        "LlamaForCausalLM",
        {**GQA, "mlp_layer_fusion": True, "qk_interleaved": True},
    ),
    "internlm2-biases": ("INTERNLM2", "LlamaForCausalLM", {**GQA, "no_bias": False, "mlp_bias": True}),
    "internlm3": ("INTERNLM3", "LlamaForCausalLM", {**GQA, "rope_base": 5e7}),
    "llama2": ("LLAMA2", "LlamaForCausalLM", {}),
    "llama2-one-kv-head": ("LLAMA2", "LlamaForCausalLM", {"num_kv_attention_heads": 1, "layer_norm_epsilon": 1e-3}),
    "llama2-interleaved": ("LLAMA2", "LlamaForCausalLM", {**GQA, "qk_interleaved": True}),
    "llama2-tied": ("LLAMA2", "LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama2-fp32-residual": ("LLAMA2", "LlamaForCausalLM", {"residual_in_fp32": True}),
    "llama2-linear": ("LLAMA2", "LlamaForCausalLM", {"rope_scaling": {"type": "linear", "factor": 3.0}}),
    "llama2-dynamic-short": ("LLAMA2", "LlamaForCausalLM", {"rope_scaling": {"type": "dynamic", "factor": 3.0}}),
    "llama2-dynamic-long": ("LLAMA2", "LlamaForCausalLM", {**LONG, "rope_scaling": {"type": "dynamic", "factor": 3.0}}),
    "llama2-dynamic-key": ("LLAMA2", "LlamaForCausalLM", {**LONG, "use_dynamic_ntk_rope": True}),
    "llama2-yarn": (
        "LLAMA2",
        "LlamaForCausalLM",
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    ),
    "llama3": (
        "LLAMA3",
        "LlamaForCausalLM",
        {**GQA, "rope_scaling": {"type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32}},
    ),
    "qwen2": ("QWEN2", "Qwen2ForCausalLM", GQA),
    "qwen2-window": (
        "QWEN2",
        "Qwen2ForCausalLM",
        {**GQA, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("QWEN3", "Qwen3ForCausalLM", {**GQA, "head_dim": 10}),
    "qwen3-fused-interleaved": (
        "QWEN3",
        "Qwen3ForCausalLM",
        {**GQA, "enable_qkv_fusion": True, "qk_interleaved": True},
    ),
    "gemma": ("GEMMA", "GemmaForCausalLM", {"num_kv_attention_heads": 1, "head_dim": 12}),
    "gemma-untied": ("GEMMA", "GemmaForCausalLM", {"tie_word_embeddings": False}),
    "mixtral": ("MIXTRALMOE", "MixtralForCausalLM", {**GQA, **EXPERTS}),
    "mixtral-window-interleaved": (
        "MIXTRALMOE",
        "MixtralForCausalLM",
        {**GQA, **EXPERTS, "top_k": 1, "sliding_window": 7, "qk_interleaved": True, "head_dim": 10},
    ),
    "internlm-moe-no-biases": ("INTERNLM_MoE", "MixtralForCausalLM", {**EXPERTS, "no_bias": True}),
    "qwen2-moe": (
        "QWEN2MOE",
        "Qwen2MoeForCausalLM",
        {
            **GQA,
            **EXPERTS,
            "num_shared_experts": 2,
            "mlp_only_layers": (1,),
            "moe_layer_kwargs": {"normalize_expert_weights": False},
        },
    ),
    "qwen2-moe-window-fused": (
        "QWEN2MOE",
        "Qwen2MoeForCausalLM",
        {
            **EXPERTS,
            "num_shared_experts": 1,
            "mlp_layer_fusion": True,
            "enable_qkv_fusion": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
        },
    ),
    "qwen3-moe": ("QWEN3MOE", "Qwen3MoeForCausalLM", {**GQA, **EXPERTS, "head_dim": 10, "top_k": 5}),
    "qwen3-moe-not-normalized": (
        "QWEN3MOE",
        "Qwen3MoeForCausalLM",
        {
            **EXPERTS,
            **DENSE_FIRST,
            "moe_layer_kwargs": {"normalize_expert_weights": False},
            "layer_norm_epsilon": 1e-3,
        },
    ),
    "glm4-moe": (
        "GLM4_MOE",
        "Glm4MoeForCausalLM",
        {
            **GQA,
            **EXPERTS,
            **DENSE_FIRST,
            "head_dim": 12,
            "qk_norm": True,
            "num_shared_experts": 2,
            "num_experts": 6,
            "moe_layer_kwargs": {
                "scoring_func": "sigmoid",
                "selection_bias": True,
                "routed_scaling_factor": 2.5,
                "n_group": 3,
                "topk_group": 2,
                "group_score": "top2_sum",
            },
        },
    ),
    "glm4-moe-interleaved": (
        "GLM4_MOE",
        "Glm4MoeForCausalLM",
        {
            **EXPERTS,
            "head_dim": 10,
            "partial_rotary_factor": 0.4,
            "no_bias": True,
            "enable_qkv_fusion": True,
            "qk_interleaved": True,
            "num_shared_experts": 1,
            "moe_layer_kwargs": {
                "scoring_func": "sigmoid",
                "selection_bias": True,
                "normalize_expert_weights": False,
            },
        },
    ),
    "olmoe": (
        "OLMOE",
        "OlmoeForCausalLM",
        {**GQA, **EXPERTS, "clip_qkv": 1.5, "moe_layer_kwargs": {"normalize_expert_weights": False}},
    ),
    "olmoe-fused-interleaved": (
        "OLMOE",
        "OlmoeForCausalLM",
        {**EXPERTS, "no_bias": False, "enable_qkv_fusion": True, "qk_interleaved": True},
    ),
    "deepseek-v2": (
        "DEEPSEEK_V2",
        "DeepseekV2ForCausalLM",
        {
            **LATENT,
            **EXPERTS,
            "num_experts": 6,
            "num_shared_experts": 2,
            "moe_layer_kwargs": {
                "normalize_expert_weights": False,
                "routed_scaling_factor": 16.0,
                "n_group": 3,
                "topk_group": 2,
            },
        },
    ),
    "deepseek-v2-lite": (
        "DEEPSEEK_V2",
        "DeepseekV2ForCausalLM",
        {
            **LATENT,
            "q_lora_rank": None,
            **EXPERTS,
            "moe_intermediate_size": 24,
            "intermediate_size": 56,
            "first_k_dense_replace": 1,
            "num_shared_experts": 1,
            "moe_layer_kwargs": {"normalize_expert_weights": False},
            "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
            "qk_interleaved": True,
        },
    ),
    "deepseek-v3": (
        "DEEPSEEK_V3",
        "DeepseekV3ForCausalLM",
        {
            **LATENT,
            "v_head_dim": 14,
            **EXPERTS,
            "moe_intermediate_size": 24,
            "intermediate_size": 56,
            "first_k_dense_replace": 1,
            "num_experts": 8,
            "num_shared_experts": 1,
            "moe_layer_kwargs": {
                "scoring_func": "sigmoid",
                "selection_bias": True,
                "routed_scaling_factor": 2.5,
                "n_group": 4,
                "topk_group": 2,
                "group_score": "top2_sum",
            },
            "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
        },
    ),
    "kimi-k2": (
        "KIMI_K2",
        "DeepseekV3ForCausalLM",
        {
            **LATENT,
            **EXPERTS,
            "num_shared_experts": 1,
            "moe_layer_kwargs": {"scoring_func": "sigmoid", "selection_bias": True, "routed_scaling_factor": 2.827},
            "qk_interleaved": True,
        },
    ),
    "gpt-oss": (
        "GPT_OSS",
        "GptOssForCausalLM",
        {
            **GQA,
            **EXPERTS,
            "num_layers": 3,
            "sliding_window": 5,
            "rope_scaling": {
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "truncate": False,
            },
        },
    ),
    "gpt-oss-fused-interleaved": (
        "GPT_OSS",
        "GptOssForCausalLM",
        {**EXPERTS, "top_k": 1, "enable_qkv_fusion": True, "qk_interleaved": True, "no_bias": True},
    ),
    "mistral-no-window": ("MISTRAL", "LlamaForCausalLM", GQA),
    "mistral-window": ("MISTRAL", "MistralForCausalLM", {**GQA, "sliding_window": 7}),
}

LENGTHS = (1, 23, 9, 9, 3)


def _randomize(model: nn.Module) -> None:
    """Biases and norms too: at their initial values they would hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith(("bias", "sinks.weight")):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
            else:
                parameter.mul_(4)


def _peer(model: Any) -> Any:
    config = hf_config(model.architecture)
    config.pad_token_id = None  # Gemma's embedding of its padding token takes no gradient
    # No kernel of PyTorch has attention sinks.
    attention = "eager" if model.architecture.attention_sinks else "sdpa"
    peer = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, experts_implementation="eager"
    )
    missing, unexpected = peer.load_state_dict(
        to_hf(model.state_dict(), model.architecture, "fused_experts"), strict=False
    )
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if model.architecture.tie_word_embeddings else set())
    return peer


def _tokens(model: Any, *shape: int) -> Tensor:
    return torch.randint(model.architecture.vocab_size, shape, generator=torch.Generator().manual_seed(2))


def _loss_of_peer(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1), reduction="sum")


def _assert_same(ours: Tensor, theirs: Tensor, what: str) -> None:
    """Within 1e-5 of the largest value: fp32 carries 6e-8 a rounding, through about a hundred of them."""
    torch.testing.assert_close(
        ours, theirs, rtol=0, atol=1e-5 * max(1.0, theirs.abs().max().item()), msg=lambda m: f"{what}: {m}"
    )


def _assert_same_gradients(model: Any, peer: nn.Module) -> None:
    gradients = {n: p.grad for n, p in peer.named_parameters() if p.grad is not None}
    theirs = from_hf(gradients, model.architecture, "fused_experts")
    ours = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert ours.keys() == theirs.keys()
    for name, grad in ours.items():
        _assert_same(grad, theirs[name], name)


@pytest.fixture(params=CASES, scope="module")
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    model_type, class_name, keys = CASES[request.param]
    model = tiny_model(model_type, **keys)
    _randomize(model)
    peer = _peer(model)
    assert type(peer).__name__ == class_name
    return model, peer


def test_rows(pair: tuple[Any, Any]) -> None:
    model, peer = pair
    ids = _tokens(model, 3, 21)
    positions = torch.arange(21).expand(3, -1)
    model.zero_grad(), peer.zero_grad()
    hidden = model(ids, positions)
    theirs = peer(ids).logits
    _assert_same(model.logits(hidden), theirs, "logits")
    labels = F.pad(ids[:, 1:], (0, 1), value=-100)
    loss = linear_cross_entropy(hidden.flatten(0, 1), model.head_weight(), labels.flatten()).loss_sum
    loss.backward()
    _loss_of_peer(theirs, ids).backward()
    _assert_same_gradients(model, peer)


def test_packed(pair: tuple[Any, Any]) -> None:
    """Documents in a pack are what each is alone."""
    model, peer = pair
    ids = _tokens(model, 1, sum(LENGTHS))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    model.zero_grad(), peer.zero_grad()
    hidden = model(ids, positions, VarlenMetadata.of(LENGTHS))
    labels = []
    for document, ours in zip(ids.split(LENGTHS, 1), model.logits(hidden).split(LENGTHS, 1), strict=True):
        theirs = peer(document).logits
        _assert_same(ours, theirs, "logits")
        labels.append(F.pad(document[:, 1:], (0, 1), value=-100))
        _loss_of_peer(theirs, document).backward()
    linear_cross_entropy(hidden[0], model.head_weight(), torch.cat(labels, 1)[0]).loss_sum.backward()
    _assert_same_gradients(model, peer)


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_dynamic_scaling_goes_by_the_length_of_each_document(factor: float) -> None:
    """Packed, padded or alone: the same loss. The padded rows are longer than the pretrained context."""
    model: Any = tiny_model("LLAMA2", **LONG, rope_scaling={"type": "dynamic", "factor": factor})
    _randomize(model)
    lengths, seq_len = (5, 16, 30, 2), 40
    documents = [_tokens(model, 1, length) for length in lengths]
    # A new one for each: transformers remembers the longest sequence.
    theirs = sum(_loss_of_peer(_peer(model)(ids).logits, ids) for ids in documents)
    pieces = [make_slice(ids[0].numpy(), np.ones(ids.shape[1], dtype=bool), ids.shape[1]) for ids in documents]
    packed = concatenate_slices(pieces, seq_len, sum(lengths), "cut", type_id=0)
    for sample in (packed, stack_slices(pieces, seq_len, rows=5, type_id=0)):
        micro = to_micro_batch(sample)
        varlen = None if micro.lengths is None else VarlenMetadata.of(micro.lengths)
        hidden = model(micro.input_ids, micro.position_ids, varlen)
        loss = linear_cross_entropy(hidden.flatten(0, 1), model.head_weight(), micro.labels.flatten()).loss_sum
        torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=0)


def test_baichuan2() -> None:
    """Published with code of its own; a Llama once its head is normalised."""
    model = tiny_model("BAICHUAN2")
    _randomize(model)
    ids = _tokens(model, 2, 13)
    ours = model.logits(model(ids, torch.arange(13).expand(2, -1)))
    _assert_same(ours, _peer(model)(ids).logits, "logits")
