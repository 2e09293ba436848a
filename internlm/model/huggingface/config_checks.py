"""Checks of a Hugging Face config.json: values have the right type, and no unread key changes the function."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

_SIZES = {
    "vocab_size": 1 << 30,
    "hidden_size": 1 << 24,
    "intermediate_size": 1 << 24,
    "num_hidden_layers": 10_000,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
    "max_position_embeddings": 1 << 40,
}
"""Key -> largest accepted value; a larger one is an error, and would be slow to build."""
_MAY_BE_NULL = ("num_key_value_heads", "head_dim", "rope_theta")
_NUMBERS = ("rms_norm_eps", "rope_theta")
_SWITCHES = (
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "bias",
    "qkv_bias",
    "use_sliding_window",
    "is_encoder_decoder",
)
_SECTIONS = ("rope_scaling", "rope_parameters", "rotary")

_INERT = frozenset(
    {
        # Keys of the file, the library or training, not of the function.
        *("_name_or_path", "_attn_implementation", "architectures", "auto_map", "model_type", "transformers_version"),
        *("dtype", "torch_dtype", "use_cache", "return_dict", "output_attentions", "output_hidden_states"),
        *(
            "attn_implementation",
            "chunk_size_feed_forward",
            "problem_type",
            "id2label",
            "label2id",
            "gradient_checkpointing",
        ),
        *("initializer_range", "tokenizer_class", "model_max_length", "task_specific_params", "finetuning_task"),
        *("use_flash_attn", "_flash_attn_2_enabled", "unsloth_version", "unsloth_fixed", "neftune_noise_alpha"),
        # Of tensor-parallel pretraining, which is equal up to rounding.
        "pretraining_tp",
        # Keys of the tokenizer and of generation.
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "prefix"),
        *("is_decoder", "add_cross_attention", "max_length", "min_length", "do_sample", "num_beams", "temperature"),
        *("top_k", "top_p", "repetition_penalty", "num_return_sequences", "max_new_tokens", "early_stopping"),
    }
)
_OTHER_FUNCTIONS = (
    *("attn_logit_softcapping", "final_logit_softcapping", "attn_logit_softcap", "final_logit_softcap", "clip_qkv"),
    *("logit_scale", "logits_scaling", "attention_multiplier", "residual_multiplier", "embedding_multiplier"),
    *("scale_emb", "scale_depth", "dim_model_base", "query_pre_attn_scalar", "embedding_scale"),
    *(
        "partial_rotary_factor",
        "rotary_pct",
        "rotary_dim",
        "no_rope_layers",
        "nope_layer_interval",
        "position_embedding_type",
    ),
    *("alibi", "use_alibi", "use_dynamic_ntk", "use_logn_attn", "attention_chunk_size", "attn_temperature_tuning"),
    *("use_qk_norm", "qk_norm", "qk_layernorm", "use_parallel_residual", "parallel_attn"),
    *("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size", "num_experts_per_tok"),
    *("n_shared_experts", "num_shared_experts", "shared_expert_intermediate_size", "first_k_dense_replace"),
    *("moe_layer_freq", "decoder_sparse_step", "router_jitter_noise", "routed_scaling_factor", "scoring_func"),
    *("kv_lora_rank", "q_lora_rank", "num_nextn_predict_layers", "mlp_only_layers", "vision_config", "kv_sharing"),
)
"""Keys of other families that change the function in any code that reads them."""


def mistakes(values: Mapping[str, Any]) -> list[str]:
    """Values of the wrong type or range, one line each."""
    found = [
        f"{key} must be a whole number from 1 to {most:,}, got {values[key]!r}"
        for key, most in _SIZES.items()
        if key in values and not is_whole(values[key], 1, most) and (values[key] is not None or key not in _MAY_BE_NULL)
    ]
    found += [
        f"{key} must be a number above 0, got {values[key]!r}"
        for key in _NUMBERS
        if key in values and not _is_positive(values[key]) and (values[key] is not None or key not in _MAY_BE_NULL)
    ]
    found += [
        f"{key} must be true or false, got {values[key]!r}"
        for key in _SWITCHES
        if values.get(key) is not None and not isinstance(values[key], bool)
    ]
    found += [
        f"{key} must be an object, got {values[key]!r}"
        for key in _SECTIONS
        if values.get(key) is not None and not isinstance(values[key], dict)
    ]
    architectures = values.get("architectures")
    if architectures is not None and not _is_list_of(architectures, str):
        found.append(f"architectures must be a list of names, got {architectures!r}")
    for key in ("dtype", "torch_dtype"):
        if not isinstance(values.get(key), str | None):
            found.append(f"{key} must be the name of a number format, got {values[key]!r}")
    window = values.get("sliding_window")
    # transformers writes 0 for Qwen2-MoE without windows.
    is_off = values.get("model_type") == "qwen2_moe" and window == 0 and not values.get("use_sliding_window")
    if window is not None and not is_off and not is_whole(window, 1):
        # In transformers, 0 does not mean "no window": no token would attend to any.
        found.append(f"sliding_window must be a whole number from 1, or null for no window; got {window!r}")
    if values.get("layer_types") is not None and not _is_list_of(values["layer_types"], str):
        found.append(f"layer_types must be a list of names, got {values['layer_types']!r}")
    first = values.get("max_window_layers")
    if first is not None and not is_whole(first, 0):
        found.append(f"max_window_layers must be a whole number from 0, got {first!r}")
    return found


def unread(values: Mapping[str, Any], read: Collection[str]) -> tuple[list[str], list[str]]:
    """Unread keys: those that change the function, and all others.

    Args:
        values: content of the config.json.
        read: keys that the family's class or its reader uses.

    Returns:
        "key = value" of each key whose value does not mean "off".
    """
    other_functions, others = [], []
    for key, value in values.items():
        if key in read or key in _INERT or value is None or value is False or value in (0, "", [], {}):
            continue
        if key in _OTHER_FUNCTIONS and not _is_neutral(key, value):
            other_functions.append(f"{key} = {value!r}")
        elif key not in _OTHER_FUNCTIONS:
            others.append(f"{key} = {value!r}")
    return other_functions, others


def _is_neutral(key: str, value: Any) -> bool:
    """Whether the value is a factor of 1, or means every layer."""
    is_count = key.startswith(("num_", "n_", "first_"))
    return isinstance(value, int | float) and not isinstance(value, bool) and value == 1 and not is_count


def is_whole(value: object, least: int, most: float = math.inf) -> bool:
    """Whether a value is an int from `least` to `most`."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _is_list_of(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)
