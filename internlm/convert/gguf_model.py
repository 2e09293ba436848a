"""A decoder in GGUF, the file format of llama.cpp: its metadata, and the names and rows of its weights.

Written from the names and config of transformers' classes (`to_config.py`), whose rotary pairs are halves. The graph of
architecture "llama" in llama.cpp rotates adjacent pairs, those of the others halves.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from torch import Tensor

from internlm.model.architecture import Architecture
from internlm.model.huggingface.to_config import transformers_config_json
from internlm.model.modules.rotary import inverse_frequencies
from internlm.utils.errors import ConfigError
from internlm.utils.logging import get_logger

logger = get_logger(__name__)

_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma"}
"""`model_type` of transformers -> architecture of llama.cpp."""

ROPE_FACTORS = "rope_freqs.weight"
"""Tensor by which llama.cpp divides the rotary frequencies."""

_OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


@dataclasses.dataclass(frozen=True)
class GgufModel:
    """How a decoder is written.

    Attributes:
        name: architecture of llama.cpp.
        metadata: keys and values, an int as uint32 and a float as float32.
        rope_factors: fp32 `[D/2]`, content of `ROPE_FACTORS`; None: the file has no such tensor.
    """

    name: str
    architecture: Architecture
    metadata: dict[str, Any]
    rope_factors: Tensor | None

    def weight(self, hf_name: str, tensor: Tensor) -> Tensor:
        """A weight as llama.cpp computes with it."""
        if self.name == "gemma" and hf_name.endswith("norm.weight"):
            return tensor.float() + 1.0
        if self.name == "llama" and (".q_proj." in hf_name or ".k_proj." in hf_name):
            pairs = tensor.unflatten(0, (-1, 2, self.architecture.head_dim // 2))
            return pairs.transpose(1, 2).reshape(tensor.shape)
        return tensor


def gguf_model(a: Architecture, model_type: str) -> GgufModel:
    """How to write a decoder.

    Args:
        a: the decoder.
        model_type: its family.

    Raises:
        ConfigError: llama.cpp has no such architecture, or another function by that name.
    """
    # InternLM3 is a Llama, which its class in transformers hides.
    hf_type = transformers_config_json(a, "" if model_type == "INTERNLM3" else model_type)["model_type"]
    name = _ARCHITECTURES.get(hf_type)
    rope = a.rope
    refused = {
        f"the class '{hf_type}' of transformers": name is None,
        "biases of attention in qwen3": name == "qwen3" and a.qkv_bias,
        "biases in gemma": name == "gemma" and (a.qkv_bias or a.mlp_bias),
        "a head of its own in gemma": name == "gemma" and not a.tie_word_embeddings,
        f"rope scaling of type llama3 in {name}": name != "llama" and rope.rope_type == "llama3",
        "yarn that is not truncated": rope.rope_type == "yarn" and not rope.truncate,
    }
    if name is None or any(refused.values()):
        reasons = ", ".join(reason for reason, applies in refused.items() if applies)
        raise ConfigError(
            f"{model_type} is not written to GGUF: {reasons}. Written are {', '.join(_ARCHITECTURES)}. Export others "
            "with `internlm convert to-hf` and use convert_hf_to_gguf.py of llama.cpp, if it knows the class"
        )
    context, cut_by = context_of(a)
    if cut_by:
        logger.warning(
            "the context in the file is %s tokens instead of %s: llama.cpp does not have %s",
            *(f"{context:,}", f"{a.max_position_embeddings:,}", cut_by),
        )
    metadata: dict[str, Any] = {
        "context_length": context,
        "embedding_length": a.hidden_size,
        "block_count": a.num_layers,
        "feed_forward_length": a.intermediate_size,
        "attention.head_count": a.num_heads,
        "attention.head_count_kv": a.num_kv_heads,
        "attention.key_length": a.head_dim,
        "attention.value_length": a.head_dim,
        "attention.layer_norm_rms_epsilon": float(a.norm_eps),
        "rope.dimension_count": a.head_dim,
        "rope.freq_base": float(rope.base),
        "vocab_size": a.vocab_size,
        **_rope_scaling(a),
    }
    factors = None
    if rope.rope_type == "llama3":
        factors = inverse_frequencies(dataclasses.replace(rope, rope_type="default")) / inverse_frequencies(rope)
    return GgufModel(name, a, {f"{name}.{key}": value for key, value in metadata.items()}, factors)


def gguf_name(hf_name: str) -> str:
    """The name of a weight in GGUF for that in transformers' files."""
    match = _LAYER.fullmatch(hf_name)
    return f"blk.{match[1]}.{_INNER[match[2]]}.{match[3]}" if match else _OUTER[hf_name]


def context_of(a: Architecture) -> tuple[int, str]:
    """The context within which llama.cpp computes the same function, and what cuts that of the model (or "")."""
    limits = {f"a window of {window:,} tokens": window for window in a.windows if window is not None}
    if a.rope.rope_type == "dynamic":
        limits["dynamic rotary positions"] = a.rope.max_positions
    reason = min(limits, key=lambda name: limits[name], default="")
    if reason and limits[reason] < a.max_position_embeddings:
        return limits[reason], reason
    return a.max_position_embeddings, ""


def _rope_scaling(a: Architecture) -> dict[str, Any]:
    rope = a.rope
    if rope.rope_type == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope.factor)}
    if rope.rope_type != "yarn":
        return {}
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(rope.factor),
        "rope.scaling.original_context_length": rope.max_positions,
        "rope.scaling.yarn_beta_fast": float(rope.beta_fast),
        "rope.scaling.yarn_beta_slow": float(rope.beta_slow),
        # llama.cpp multiplies it by the default of the paper.
        "rope.scaling.attn_factor": rope.attention_factor / (0.1 * math.log(rope.factor) + 1.0),
    }
