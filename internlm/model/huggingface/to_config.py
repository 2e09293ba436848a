"""The Hugging Face config of an `Architecture`: for transformers' classes, and for families published with their code.

`from_config.py` is the inverse.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from internlm.model.architecture import Architecture
from internlm.model.huggingface.expert_config import has_gaps_in_windows, mixture_config, mixture_kind, unlike_mixtures
from internlm.model.huggingface.weight_names import Layout
from internlm.utils.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh", "clamped_silu": "silu"}

_PUBLISHED_LAYOUTS: dict[str, Layout] = {"INTERNLM2": "internlm2", "BAICHUAN2": "baichuan2"}
"""Model types whose published checkpoints have their own weight names; all others have transformers' names."""


def weight_layout(architecture: Architecture, model_type: str, *, published: bool) -> Layout:
    """The layout of weight names in the files of a model.

    Args:
        architecture: of the model.
        model_type: the family.
        published: as in the family's published checkpoints, instead of as in the library's own classes.
    """
    if published and model_type in _PUBLISHED_LAYOUTS:
        return _PUBLISHED_LAYOUTS[model_type]
    return "mixtral" if mixture_kind(architecture) == "mixtral" else "transformers"


def hf_config(architecture: Architecture, model_type: str = "") -> PretrainedConfig:
    """The config of the transformers class that computes the same function as this architecture.

    Args:
        architecture: of the model.
        model_type: the family; "INTERNLM3" gets its own class, if this version of transformers has it.

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
        "hidden_act": _ACTIVATIONS[a.activation],
        "max_position_embeddings": _max_positions(a),
        "rms_norm_eps": a.norm_eps,
        "tie_word_embeddings": a.tie_word_embeddings,
        "rope_parameters": {"rope_theta": a.rope.base, **_rope_scaling(a)},
        "dtype": a.dtype,
        # The default token ids of the classes may differ from those of this model's tokenizer.
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }
    _refuse(
        "transformers has no class for this model",
        {"latent attention without experts": a.latent is not None and a.experts is None},
    )
    if a.experts is not None:
        _refuse(f"transformers has no class for this mixture of experts ({model_type})", unlike_mixtures(a))
        return mixture_config(a, keys)
    windows = {window for window in a.windows if window is not None}
    gemma = a.unit_offset_norm
    fits_llama = a.hidden_size % a.num_heads == 0
    _refuse(
        "transformers has no class for this model",
        {
            "norm_type 'layernorm'": a.norm_type != "rmsnorm",
            "is_reward": a.is_reward,
            "partial_rotary_factor": a.rope.head_dim != a.head_dim,
            "clip_qkv": a.clip_qkv is not None,
            "attention sinks": a.attention_sinks,
            "sliding_window_pattern": has_gaps_in_windows(a),
            "norms of whole projections": a.norms_whole_projections,
            "o_bias without qkv_bias": a.o_bias and not a.qkv_bias,
            "norms times 1 + weight and embeddings times sqrt(hidden_size), one without the other": gemma
            != (a.embedding_multiplier != 1.0),
            "Gemma with q and k norms or a window": gemma and (a.qk_norm or bool(windows)),
            "Gemma with bias on qkv alone": gemma and a.qkv_bias != a.o_bias,
            "mlp_bias with a window, q and k norms or bias on qkv alone": a.mlp_bias
            and (gemma or a.qk_norm or bool(windows) or a.qkv_bias != a.o_bias),
            "qk_norm with bias on qkv alone": a.qk_norm and a.qkv_bias != a.o_bias,
            "a window with o_bias": bool(windows) and a.o_bias and not a.qk_norm,
            "o_bias or mlp_bias with a hidden_size that is not a multiple of the heads": (a.o_bias or a.mlp_bias)
            and not (a.qk_norm or gemma or fits_llama),
        },
    )
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
    if not fits_llama:
        # transformers' Llama rejects such sizes; its Mistral is equal to a Llama without biases.
        return transformers.MistralConfig(**keys, sliding_window=None)
    if model_type == "INTERNLM3" and a.qkv_bias == a.mlp_bias and hasattr(transformers, "InternLM3Config"):
        return transformers.InternLM3Config(**keys, attention_bias=a.qkv_bias, mlp_bias=a.mlp_bias)
    return transformers.LlamaConfig(**keys, attention_bias=a.qkv_bias, mlp_bias=a.mlp_bias)


def transformers_config_json(architecture: Architecture, model_type: str = "") -> dict[str, Any]:
    """The config.json of `hf_config`, with the rotary keys of transformers 4 in addition to those of 5.

    Version 4 does not read `rope_parameters`, and would silently use its default base.

    Raises:
        ConfigError: transformers has no such class.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    values = hf_config(architecture, model_type).to_diff_dict()
    if architecture.num_multi_token:
        names = {"num_nextn_predict_layers", *({"num_mtp_layers"} & values.keys())}
        values |= dict.fromkeys(names, architecture.num_multi_token)
    values["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[values["model_type"]]]
    if values["model_type"] == "qwen3_moe":
        # The only name that version 4 reads.
        values["num_experts"] = values["num_local_experts"]
    if "partial_rotary_factor" in values["rope_parameters"]:
        # Where version 4 reads it.
        values["partial_rotary_factor"] = values["rope_parameters"]["partial_rotary_factor"]
    return {**values, **_legacy_rope(architecture), "torch_dtype": values["dtype"]}


def published_config_json(architecture: Architecture, model_type: str) -> dict[str, Any]:
    """The config.json of the family's published checkpoints.

    INTERNLM, INTERNLM2 and BAICHUAN2 were published with their own code (`auto_map` names its files, which are next to
    the published weights); all other families have classes in transformers.

    Raises:
        ConfigError: the published code does not compute this model.
    """
    published = {"INTERNLM": _internlm, "INTERNLM2": _internlm2, "BAICHUAN2": _baichuan2}
    if model_type not in published:
        return transformers_config_json(architecture, model_type)
    a = architecture
    refused = {
        "norm_type 'layernorm'": a.norm_type != "rmsnorm",
        "is_reward": a.is_reward,
        "a window": any(window is not None for window in a.windows),
        "qk_norm": a.qk_norm,
        "partial_rotary_factor": a.rope.head_dim != a.head_dim,
        "clip_qkv": a.clip_qkv is not None,
        "mlp_bias": a.mlp_bias,
        "qkv_bias and o_bias that differ": a.qkv_bias != a.o_bias,
        "a head_dim other than hidden_size / heads": a.head_dim * a.num_heads != a.hidden_size,
        f"rope_scaling of type '{a.rope.rope_type}'": a.rope.rope_type not in ("default", "dynamic", "linear"),
        "an activation other than silu": a.activation != "silu",
    }
    common = {
        "vocab_size": a.vocab_size,
        "hidden_size": a.hidden_size,
        "intermediate_size": a.intermediate_size,
        "num_hidden_layers": a.num_layers,
        "num_attention_heads": a.num_heads,
        "hidden_act": "silu",
        "max_position_embeddings": _max_positions(a),
        "rms_norm_eps": a.norm_eps,
        "tie_word_embeddings": a.tie_word_embeddings,
        "torch_dtype": str(a.dtype).removeprefix("torch."),
    }
    own = published[model_type](a, refused)
    _refuse(f"the published code of {model_type} does not compute this model (try --layout transformers)", refused)
    return {**common, **own}


def _internlm(a: Architecture, refused: dict[str, bool]) -> dict[str, Any]:
    refused["fewer key-value heads than heads"] = a.num_kv_heads != a.num_heads
    refused["rope_scaling of type 'linear'"] = a.rope.rope_type == "linear"
    kind = "origin" if a.rope.rope_type == "default" else "dynamic"
    return {
        "model_type": "internlm",
        "architectures": ["InternLMForCausalLM"],
        "auto_map": _auto_map("configuration_internlm.InternLMConfig", "modeling_internlm.InternLMForCausalLM"),
        "bias": a.qkv_bias,
        "rotary": {"type": kind, "base": a.rope.base, "scaling_factor": a.rope.factor},
    }


def _internlm2(a: Architecture, refused: dict[str, bool]) -> dict[str, Any]:
    scaling = {"type": a.rope.rope_type, "factor": a.rope.factor} if a.rope.rope_type != "default" else None
    return {
        "model_type": "internlm2",
        "architectures": ["InternLM2ForCausalLM"],
        "auto_map": _auto_map("configuration_internlm2.InternLM2Config", "modeling_internlm2.InternLM2ForCausalLM"),
        "num_key_value_heads": a.num_kv_heads,
        "bias": a.qkv_bias,
        "rope_theta": a.rope.base,
        "rope_scaling": scaling,
    }


def _baichuan2(a: Architecture, refused: dict[str, bool]) -> dict[str, Any]:
    refused["fewer key-value heads than heads"] = a.num_kv_heads != a.num_heads
    refused["biases"] = a.qkv_bias
    refused["rope_base other than 10000"] = a.rope.base != 10000
    refused["rope_scaling"] = a.rope.rope_type != "default"
    refused["tie_word_embeddings"] = a.tie_word_embeddings
    refused["norm_head = False"] = not a.norm_head
    return {
        "model_type": "baichuan",
        "architectures": ["BaichuanForCausalLM"],
        "auto_map": _auto_map("configuration_baichuan.BaichuanConfig", "modeling_baichuan.BaichuanForCausalLM"),
        "model_max_length": a.max_position_embeddings,
    }


def _auto_map(config: str, model: str) -> dict[str, str]:
    return {"AutoConfig": config, "AutoModelForCausalLM": model}


def _refuse(what: str, refused: dict[str, bool]) -> None:
    if any(refused.values()):
        raise ConfigError(f"{what}: {', '.join(reason for reason, applies in refused.items() if applies)}")


def _max_positions(a: Architecture) -> int:
    """Value of `max_position_embeddings`.

    For "dynamic" and "linear" this is the pretrained length, and `factor` multiplies it. For "yarn" it is the extended
    one: transformers 4 ignores `factor` and uses the ratio to `original_max_position_embeddings`.
    """
    return a.rope.max_positions if a.rope.rope_type in ("dynamic", "linear") else a.max_position_embeddings


def _legacy_rope(a: Architecture) -> dict[str, Any]:
    return {
        "rope_theta": a.rope.base,
        "rope_scaling": None if a.rope.rope_type == "default" else _rope_scaling(a),
    }


def _rope_scaling(a: Architecture) -> dict[str, Any]:
    rope = a.rope
    scaling: dict[str, Any] = {"rope_type": rope.rope_type}
    if rope.rope_type != "default":
        scaling["factor"] = rope.factor
    if rope.rope_type in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = rope.max_positions
    if rope.rope_type == "llama3":
        scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.rope_type == "yarn":
        scaling |= {"beta_slow": rope.beta_slow, "beta_fast": rope.beta_fast}
        scaling["attention_factor"] = rope.attention_factor
        if rope.mscale_all_dim:
            scaling |= {"mscale": rope.mscale, "mscale_all_dim": rope.mscale_all_dim}
        if not rope.truncate:
            scaling["truncate"] = False
    return scaling
