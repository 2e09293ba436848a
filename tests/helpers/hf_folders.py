"""Hugging Face folders with random tiny models, as transformers or the families' own code would have written them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}

WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

DEEPSEEK = {
    "num_key_value_heads": None,
    "num_nextn_predict_layers": 0,
    "v_head_dim": 6,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 24,
}
NATIVE: dict[str, tuple[str, dict[str, Any]]] = {
    # name: (transformers' config class, keys)
    "llama": ("LlamaConfig", {}),
    "llama-biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama3": ("LlamaConfig", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, **LLAMA3}}),
    "llama-linear": ("LlamaConfig", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
    "llama-dynamic": ("LlamaConfig", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0}}),
    "llama-yarn": (
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral-window": ("MistralConfig", {"sliding_window": 7}),
    "mistral-head-dim": ("MistralConfig", {"sliding_window": 7, "head_dim": 10}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2-tied-window": ("Qwen2Config", {"tie_word_embeddings": True, **WINDOW}),
    "qwen3": ("Qwen3Config", {"head_dim": 10}),
    "qwen3-biases": ("Qwen3Config", {"head_dim": 10, "attention_bias": True}),
    "gemma": ("GemmaConfig", {"head_dim": 12, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "gemma-untied": ("GemmaConfig", {"head_dim": 8}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 5}),
    "mixtral-window-tied": (
        "MixtralConfig",
        {"num_local_experts": 3, "num_experts_per_tok": 3, "sliding_window": 7, "tie_word_embeddings": True},
    ),
    "qwen2-moe": ("Qwen2MoeConfig", {**EXPERTS, "shared_expert_intermediate_size": 48}),
    "qwen2-moe-window-norm": (
        "Qwen2MoeConfig",
        {
            **EXPERTS,
            **WINDOW,
            "layer_types": ["full_attention", "sliding_attention"],
            "shared_expert_intermediate_size": 24,
            "norm_topk_prob": True,
            "qkv_bias": False,
        },
    ),
    "qwen3-moe": ("Qwen3MoeConfig", {**EXPERTS, "head_dim": 10, "norm_topk_prob": True}),
    "qwen3-moe-biases-window": (
        "Qwen3MoeConfig",
        {
            **EXPERTS,
            "head_dim": 8,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "mlp_only_layers": [0],
        },
    ),
    "gpt-oss": ("GptOssConfig", {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 5, "head_dim": 8}),
    "olmoe": ("OlmoeConfig", {"num_experts": 5, "num_experts_per_tok": 2, "clip_qkv": 2.5}),
    "glm4-moe": (
        "Glm4MoeConfig",
        {
            "n_routed_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "n_shared_experts": 2,
            "n_group": 2,
            "topk_group": 1,
            "head_dim": 12,
            "attention_bias": True,
            "use_qk_norm": True,
            "num_nextn_predict_layers": 0,
        },
    ),
    "deepseek-v2-yarn": (
        "DeepseekV2Config",
        {
            **DEEPSEEK,
            "q_lora_rank": None,
            "n_group": 3,
            "topk_group": 2,
            "topk_method": "group_limited_greedy",
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "mscale": 0.707,
                "mscale_all_dim": 0.707,
            },
        },
    ),
    "deepseek-v3": (
        "DeepseekV3Config",
        {**DEEPSEEK, "q_lora_rank": 20, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    "internlm3": ("InternLM3Config", {"head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 5e7}}),
}


def _attention_of(config: Any) -> str:
    """No kernel of PyTorch has the attention sinks of gpt-oss."""
    return "eager" if config.model_type == "gpt_oss" else "sdpa"


def native_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of one of transformers' classes; every weight is random, biases and norms too."""
    class_name, keys = NATIVE[name]
    config = getattr(transformers, class_name)(**{**SIZES, **keys, "pad_token_id": None})
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=_attention_of(config), experts_implementation="eager"
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer += 0.2 * torch.randn(buffer.shape, generator=generator)
    return model.to(dtype).eval()


def save_native(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """`native_model`, saved by transformers in several files; returns the model."""
    model = native_model(name, dtype)
    model.save_pretrained(folder, max_shard_size="40KB")
    return model


def save_published(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A folder as the published code of "internlm", "internlm2" or "baichuan2" has it; returns the Llama that computes
    the same. What goes where is written down here once more, row by row."""
    heads = {"internlm": 6, "internlm2": 2, "baichuan2": 6}[name]
    bias = name == "internlm"
    config = transformers.LlamaConfig(**{**SIZES, "num_key_value_heads": heads, "attention_bias": bias})
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter += 0.2 * torch.randn(parameter.shape).to(dtype)
    weights = {key: tensor.clone() for key, tensor in llama.state_dict().items()}
    values: dict[str, Any] = {**SIZES, "hidden_act": "silu", "torch_dtype": str(dtype).removeprefix("torch.")}
    if name == "internlm":
        del values["num_key_value_heads"]
        values |= {"model_type": "internlm", "architectures": ["InternLMForCausalLM"], "bias": True}
        values["rotary"] = {"base": 10000, "type": "dynamic"}
    elif name == "internlm2":
        values |= {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "bias": False}
        values |= {"rope_theta": 10000, "rope_scaling": None}
        weights = _as_internlm2(weights)
    else:
        del values["num_key_value_heads"]
        values |= {"model_type": "baichuan", "architectures": ["BaichuanForCausalLM"], "model_max_length": 64}
        for layer in range(2):
            before = f"model.layers.{layer}.self_attn."
            parts = [weights.pop(f"{before}{part}_proj.weight") for part in "qkv"]
            weights[f"{before}W_pack.weight"] = torch.cat(parts)
        # The published code normalises the rows of its head; a Llama has them normalised in the file.
        with torch.no_grad():
            llama.lm_head.weight.copy_(torch.nn.functional.normalize(llama.lm_head.weight))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(values))
    return llama


def _as_internlm2(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Three query heads, a key head and a value head, of eight rows each, for each of two groups."""
    names = {
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "embed_tokens": "tok_embeddings",
        "lm_head": "output",
    }
    renamed = {}
    for name, tensor in weights.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    for layer in range(2):
        q, k, v = (renamed.pop(f"model.layers.{layer}.self_attn.{part}_proj.weight") for part in "qkv")
        rows = [q[:24], k[:8], v[:8], q[24:], k[8:], v[8:]]
        renamed[f"model.layers.{layer}.attention.wqkv.weight"] = torch.cat(rows)
    return renamed


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of the safetensors files in a folder, read by their own library."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def load_native(folder: Path) -> Any:
    """The folder's model by AutoModelForCausalLM, without code of the folder; all weights must be there and known."""
    attention = _attention_of(transformers.AutoConfig.from_pretrained(folder))
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation=attention, experts_implementation="eager"
    )
    assert not any(info.values()), info
    return model.eval()


def assert_same_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Same names, dtypes and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def random_tokens(*shape: int) -> Tensor:
    """Token ids below the tiny vocabulary, always the same."""
    return torch.randint(97, shape, generator=torch.Generator().manual_seed(2))


def assert_same_logits(ours: Tensor, theirs: Tensor) -> None:
    """Within 1e-5 of the largest value: fp32 carries 6e-8 a rounding, through about a hundred of them."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, theirs.abs().max().item()))
