"""Weights of a `Decoder` under their Hugging Face names and layouts, and back.

Three layouts: "transformers" (what the library's own classes read: separate projections, half-split rotary pairs), and
those in which two families were published with code of their own: "internlm2" (wqkv by key-value group) and "baichuan2"
(W_pack: rows q, k, v). Every translation goes through one canonical form: our names, nothing fused, half-split pairs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from internlm.model.architecture import Architecture
from internlm.utils.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Layout = Literal["transformers", "internlm2", "baichuan2"]

_OUTER = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}

_INNER = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}

_PACKED = "self_attn.W_pack"

_LAYER = re.compile(r"layers\.(\d+)\.(.+)\.(weight|bias)")


def to_hf(
    state: Mapping[str, Tensor], architecture: Architecture, layout: Layout = "transformers"
) -> dict[str, Tensor]:
    """Translate a state dict of ours.

    Args:
        state: global (unsplit) tensors by our names.
        architecture: of the model they belong to.
        layout: see the module.

    Returns:
        The tensors under Hugging Face names; views where nothing had to move. With `norm_head` the head is exported
        normalised, so that a plain head gives the same logits.
    """
    plain = _to_canonical(state, architecture)
    if architecture.norm_head and "output.weight" in plain:
        plain["output.weight"] = F.normalize(plain["output.weight"])
    if layout == "internlm2":
        return {
            f"model.{name}" if not name.startswith("output.") else name: t
            for name, t in _fuse_qkv(plain, architecture).items()
        }
    renamed: dict[str, Tensor] = {}
    for name, tensor in plain.items():
        renamed[_rename(name, _OUTER, _INNER, "", "model.")] = tensor
    if layout == "baichuan2":
        for name in [name for name in renamed if name.endswith("self_attn.q_proj.weight")]:
            names = [name.replace("q_proj", part) for part in ("q_proj", "k_proj", "v_proj")]
            renamed[name.replace("self_attn.q_proj", _PACKED)] = torch.cat([renamed.pop(part) for part in names])
    return renamed


def from_hf(
    state: Mapping[str, Tensor], architecture: Architecture, layout: Layout = "transformers"
) -> dict[str, Tensor]:
    """Translate a Hugging Face state dict to our names; the inverse of `to_hf` (but for `norm_head`).

    Raises:
        CheckpointError: a name that the layout does not have.
    """
    if layout == "internlm2":
        ours = {name.removeprefix("model."): tensor for name, tensor in state.items()}
        return _from_canonical(_split_qkv(ours, architecture), architecture)
    plain: dict[str, Tensor] = {}
    outer = {theirs: ours for ours, theirs in _OUTER.items()}
    inner = {theirs: ours for ours, theirs in _INNER.items()}
    sizes = [n * architecture.head_dim for n in (architecture.num_heads,) + (architecture.num_kv_heads,) * 2]
    for name, tensor in state.items():
        if architecture.tie_word_embeddings and name == "lm_head.weight":
            continue
        if layout == "baichuan2" and _PACKED in name:
            for part, rows in zip(("q_proj", "k_proj", "v_proj"), tensor.split(sizes), strict=True):
                plain[_rename(name.replace(_PACKED, f"self_attn.{part}"), outer, inner, "model.", "")] = rows
        else:
            plain[_rename(name, outer, inner, "model.", "")] = tensor
    return _from_canonical(plain, architecture)


def hf_config(architecture: Architecture) -> PretrainedConfig:
    """The config of the transformers class that computes the same function as this architecture.

    Raises:
        ConfigError: transformers has no such class.
    """
    import transformers

    a = architecture
    keys: dict[str, Any] = {
        "vocab_size": a.vocab_size,
        "hidden_size": a.hidden_size,
        "intermediate_size": a.intermediate_size,
        "num_hidden_layers": a.num_layers,
        "num_attention_heads": a.num_heads,
        "num_key_value_heads": a.num_kv_heads,
        "head_dim": a.head_dim,
        "max_position_embeddings": a.max_position_embeddings,
        "rms_norm_eps": a.norm_eps,
        "tie_word_embeddings": a.tie_word_embeddings,
        "rope_parameters": _rope_parameters(a),
        "dtype": a.dtype,
    }
    if a.rope.rope_type == "dynamic":
        keys["max_position_embeddings"] = a.rope.max_positions
    windows = {window for window in a.windows if window is not None}
    gemma = a.unit_offset_norm
    refused = {
        "norm_type 'layernorm'": a.norm_type != "rmsnorm",
        "is_reward": a.is_reward,
        "o_bias without qkv_bias": a.o_bias and not a.qkv_bias,
        "Gemma with q and k norms or a window": gemma and (a.qk_norm or bool(windows)),
        "mlp_bias with a window, q and k norms or bias on qkv alone": a.mlp_bias
        and (gemma or a.qk_norm or bool(windows) or a.qkv_bias != a.o_bias),
        "qk_norm with bias on qkv alone": a.qk_norm and a.qkv_bias != a.o_bias,
        "a window with o_bias": bool(windows) and a.o_bias and not a.qk_norm,
    }
    if any(refused.values()):
        reasons = ", ".join(reason for reason, holds in refused.items() if holds)
        raise ConfigError(f"transformers has no class for this model: {reasons}")
    if gemma:
        return transformers.GemmaConfig(**keys, attention_bias=a.qkv_bias)
    first_window = next((i for i, window in enumerate(a.windows) if window is not None), a.num_layers)
    sliding: dict[str, Any] = {
        "use_sliding_window": bool(windows),
        "sliding_window": next(iter(windows), None),
        "max_window_layers": first_window,
    }
    if a.qk_norm:
        return transformers.Qwen3Config(**keys, **sliding, attention_bias=a.qkv_bias)
    if a.qkv_bias and not a.o_bias:
        return transformers.Qwen2Config(**keys, **sliding)
    if windows and first_window == 0:
        return transformers.MistralConfig(**keys, sliding_window=next(iter(windows)))
    if windows:
        raise ConfigError("transformers has no class for this model: windows in some layers and no bias on q, k, v")
    return transformers.LlamaConfig(**keys, attention_bias=a.qkv_bias, mlp_bias=a.mlp_bias)


def _rope_parameters(a: Architecture) -> dict[str, Any]:
    rope = a.rope
    parameters: dict[str, Any] = {"rope_type": rope.rope_type, "rope_theta": rope.base}
    if rope.rope_type != "default":
        parameters["factor"] = rope.factor
    if rope.rope_type in ("llama3", "yarn"):
        parameters["original_max_position_embeddings"] = rope.max_positions
    if rope.rope_type == "llama3":
        parameters |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.rope_type == "yarn":
        parameters |= {"beta_slow": rope.beta_slow, "beta_fast": rope.beta_fast}
        parameters["attention_factor"] = rope.attention_factor
    return parameters


def _rename(name: str, outer: Mapping[str, str], inner: Mapping[str, str], old: str, new: str) -> str:
    """Translate one canonical or transformers name; `old` and `new` are what precedes `layers.` on either side."""
    match = _LAYER.fullmatch(name.removeprefix(old))
    if match and match[2] in inner:
        return f"{new}layers.{match[1]}.{inner[match[2]]}.{match[3]}"
    module, _, kind = name.rpartition(".")
    if module in outer:
        return f"{outer[module]}.{kind}"
    raise CheckpointError(f"unknown weight '{name}': no decoder of this package has a weight of that name")


def _to_canonical(state: Mapping[str, Tensor], a: Architecture) -> dict[str, Tensor]:
    plain: dict[str, Tensor] = {}
    for name, tensor in _split_qkv(state, a).items():
        if ".feed_forward.w13." in name:
            gate, up = tensor.chunk(2)
            plain[name.replace(".w13.", ".w1.")], plain[name.replace(".w13.", ".w3.")] = gate, up
        else:
            plain[name] = tensor
    return _reorder_pairs(plain, a, to_halves=True)


def _from_canonical(plain: Mapping[str, Tensor], a: Architecture) -> dict[str, Tensor]:
    state = _reorder_pairs(plain, a, to_halves=False)
    if a.fused_qkv:
        state = _fuse_qkv(state, a)
    if a.fused_gate_up:
        for name in [name for name in state if ".feed_forward.w1." in name]:
            halves = [state.pop(name), state.pop(name.replace(".w1.", ".w3."))]
            state[name.replace(".w1.", ".w13.")] = torch.cat(halves)
    return state


def _split_qkv(state: Mapping[str, Tensor], a: Architecture) -> dict[str, Tensor]:
    split: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".attention.wqkv." not in name:
            split[name] = tensor
            continue
        groups = tensor.unflatten(0, (a.num_kv_heads, -1, a.head_dim))
        for part, rows in (("wq", groups[:, :-2]), ("wk", groups[:, -2]), ("wv", groups[:, -1])):
            split[name.replace("wqkv", part)] = rows.reshape(-1, *tensor.shape[1:])
    return split


def _fuse_qkv(state: Mapping[str, Tensor], a: Architecture) -> dict[str, Tensor]:
    fused = dict(state)
    for name in [name for name in state if ".attention.wq." in name]:
        parts = [fused.pop(name.replace(".wq.", f".{part}.")) for part in ("wq", "wk", "wv")]
        groups = [part.unflatten(0, (a.num_kv_heads, -1, a.head_dim)) for part in parts]
        fused[name.replace(".wq.", ".wqkv.")] = torch.cat(groups, dim=1).flatten(0, 2)
    return fused


def _reorder_pairs(state: Mapping[str, Tensor], a: Architecture, *, to_halves: bool) -> dict[str, Tensor]:
    """Move the rows of q and k between adjacent pairs and halves; the heads' norms go along."""
    if not a.rope.interleaved:
        return dict(state)
    parts = (".attention.wq.", ".attention.wk.", ".attention.q_norm.", ".attention.k_norm.")
    pair_shape = (a.head_dim // 2, 2) if to_halves else (2, a.head_dim // 2)
    return {
        name: tensor.unflatten(0, (-1, *pair_shape)).transpose(1, 2).reshape(tensor.shape)
        if any(part in name for part in parts)
        else tensor
        for name, tensor in state.items()
    }
