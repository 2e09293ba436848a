"""Translates a Hugging Face config.json into the `model_type` and `model` section that compute the same function.

Keys and values with no equivalent are refused by name. Missing keys have the defaults of transformers' classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from internlm.config.schema import ModelConfig
from internlm.model.huggingface.config_checks import mistakes, unread
from internlm.model.huggingface.expert_config import CLASSES, MODEL_TYPES, expert_keys, expert_mistakes, expert_notices
from internlm.model.moe.settings import expert_settings
from internlm.utils.errors import ConfigError, nearest

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "rms_norm_eps",
)


def _place(location: tuple[int | str, ...]) -> str:
    return ".".join(_THEIR_NAMES.get(str(part), str(part)) for part in location) or "the model"


_THEIR_NAMES = {
    "num_layers": "num_hidden_layers",
    "num_kv_attention_heads": "num_key_value_heads",
    "layer_norm_epsilon": "rms_norm_eps",
    "rope_base": "rope_theta",
}
_OUR_KEY = re.compile(r"\bmodel\.(?:moe_layer_kwargs\.)?(\w+)")
_OWN_KEYS = {
    "internlm": ("bias", "rotary"),
    "internlm2": ("bias",),
    "internlm3": ("bias", "qkv_bias"),
    "baichuan": ("z_loss_weight",),
    # In transformers, another name of num_local_experts.
    "mixtral": ("num_experts",),
    "qwen3_moe": ("num_experts",),
    **{kind: one.own_keys for kind, one in CLASSES.items()},
}
"""Keys of a family's published code that its reader uses or that concern training only."""
_QUANTIZATIONS = (("gpt_oss", "mxfp4"),)
"""`model_type` and `quant_method` of quantized weights that can be read."""
_KNOWN = (
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "tie_word_embeddings",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "attention_bias",
    "mlp_bias",
)


@dataclass(frozen=True)
class HfModel:
    """A translated Hugging Face config.

    Attributes:
        model_type: our family.
        keys: of the `model` section, except `dtype`.
        dtype: dtype in the config.json, such as "torch.bfloat16"; None without one.
        notices: one line for each key that has no effect.
    """

    model_type: str
    keys: dict[str, Any]
    dtype: str | None
    notices: tuple[str, ...] = ()


def from_hf_config(values: Mapping[str, Any], where: str) -> HfModel:
    """Translate a config.json.

    Args:
        values: its content.
        where: the file, for messages.

    Raises:
        ConfigError: the family or a feature is not supported, or a value has the wrong type; names every problem.
    """
    kind = str(values.get("model_type", ""))
    if kind not in _READERS:
        known = ", ".join(_READERS)
        raise ConfigError(f"{where}: model_type '{kind}' cannot be imported; known: {known}.{nearest(kind, _READERS)}")
    has_experts = kind in MODEL_TYPES
    wrong = mistakes(values) + (expert_mistakes(values) if has_experts else [])
    if wrong:
        raise ConfigError([f"{where}: {mistake}" for mistake in wrong])
    refused: list[str] = []
    architectures = values.get("architectures") or []
    if any("CausalLM" not in name for name in architectures):
        refused.append(f"architectures {architectures}: only causal language models")
    for key in ("compression_config", "use_bidirectional_attention"):
        if values.get(key):
            refused.append(key)
    method = quantization_method(values)
    if method is not None and (kind, method) not in _QUANTIZATIONS:
        refused.append(f"quantization_config with quant_method '{method}'")
    if values.get("is_encoder_decoder"):
        refused.append("is_encoder_decoder")
    from huggingface_hub.errors import StrictDataclassError

    try:
        model_type, config = _READERS[kind](dict(values), refused)
        keys = _common(config, "gelu_pytorch_tanh" if kind == "gemma" else "silu", refused)
        keys |= _biases(kind, values, config)
        keys |= _windows(kind, config, refused)
        keys |= expert_keys(kind, config, refused) if has_experts else {}
        keys = {name: value for name, value in keys.items() if value is not None}
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, StrictDataclassError) as error:
        raise ConfigError(f"{where}: transformers cannot read it: {error!r}") from error
    other_functions, others = unread(values, {*type(config)().to_dict(), *_REQUIRED, *_KNOWN, *_OWN_KEYS.get(kind, ())})
    refused += [f"{key}: this family's class does not read it" for key in other_functions]
    if refused:
        raise ConfigError([f"{where}: not supported: {reason}" for reason in refused])
    _check(keys, values, where)
    dtype = values.get("dtype", values.get("torch_dtype"))
    if model_type == "LLAMA2" and keys.get("rope_scaling", {}).get("type") == "llama3":
        model_type = "LLAMA3"
    notices = [
        f"{key} = {values[key]!r}: ignored, as this package trains without dropout"
        for key in values
        if _is_dropout(key, values)
    ]
    notices += expert_notices(values) if has_experts else []
    notices += [
        f"{key}: ignored, as neither this package nor transformers' class reads it"
        for key in others
        if "drop" not in key
    ]
    return HfModel(
        model_type, keys, None if dtype is None else f"torch.{str(dtype).removeprefix('torch.')}", tuple(notices)
    )


def quantization_method(values: Mapping[str, Any]) -> str | None:
    """`quant_method` in a config.json ("unknown" if it has none); None for a model that is not quantized."""
    quantization = values.get("quantization_config")
    if not quantization:
        return None
    return str(quantization.get("quant_method", "unknown")) if isinstance(quantization, dict) else "unknown"


def _is_dropout(key: str, values: Mapping[str, Any]) -> bool:
    return key.endswith(("dropout", "pdrop", "dropout_prob")) and values[key] not in (None, 0, False)


def _check(keys: Mapping[str, Any], values: Mapping[str, Any], where: str) -> None:
    """Refuse values that the `model` section does not accept, under their names in config.json."""
    try:
        config = ModelConfig.model_validate(keys)
    except ValidationError as error:
        raise ConfigError(
            f"{where}: {_place(problem['loc'])}: {problem['msg']}, got {problem['input']!r}"
            for problem in error.errors()
        ) from error
    number = next((key for key in ("n_routed_experts", "num_local_experts") if key in values), "num_experts")
    names = {**_THEIR_NAMES, "num_experts": number, "top_k": "num_experts_per_tok"}
    try:
        expert_settings(config, "sum")
    except ConfigError as error:
        text = _OUR_KEY.sub(lambda key: names.get(key[1], key[1]), str(error))
        raise ConfigError(f"{where}: {text}") from None


def _common(config: PretrainedConfig, activation: str, refused: list[str]) -> dict[str, Any]:
    """The keys that all families have in common."""
    if config.hidden_act not in (activation, "swish" if activation == "silu" else activation):
        refused.append(f"hidden_act '{config.hidden_act}' (this family has '{activation}')")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_kv_attention_heads": config.num_key_value_heads,
        "head_dim": head_dim,
        "intermediate_size": config.intermediate_size,
        "layer_norm_epsilon": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        **_rope(config, refused),
    }


_PARTIAL_ROTARY = ("glm4_moe",)
"""Families whose class rotates a part of a head."""

_MSCALE = ("mscale", "mscale_all_dim")
_ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "beta_fast", "beta_slow", "attention_factor", "truncate", "original_max_position_embeddings"),
}


def _rope(config: PretrainedConfig, refused: list[str]) -> dict[str, Any]:
    values = {name: value for name, value in config.rope_parameters.items() if value is not None}
    kind = values.pop("rope_type", "default")
    values.pop("type", None)
    base = values.pop("rope_theta")
    share = values.pop("partial_rotary_factor", 1.0)
    if share != 1.0 and config.model_type not in _PARTIAL_ROTARY:
        refused.append("partial_rotary_factor")
    partial = {"partial_rotary_factor": share} if config.model_type in _PARTIAL_ROTARY else {}
    if kind not in _ROPE_KEYS:
        refused.append(f"rope_type '{kind}' (known: {', '.join(_ROPE_KEYS)})")
        return {}
    if kind in ("default", "linear", "dynamic"):
        # transformers ignores it: the pretrained length is max_position_embeddings.
        values.pop("original_max_position_embeddings", None)
    if kind == "default":
        values.pop("factor", None)
    # The scale of scores with `mscale_all_dim` is in the classes with latent attention alone.
    known = _ROPE_KEYS[kind] + (_MSCALE if kind == "yarn" and hasattr(config, "kv_lora_rank") else ())
    refused += [f"rope_parameters.{name}" for name in values if name not in known]
    scaling = {name: value for name, value in values.items() if name in known}
    return {"rope_base": base, **partial} | ({"rope_scaling": {"type": kind, **scaling}} if kind != "default" else {})


def _biases(kind: str, values: Mapping[str, Any], config: PretrainedConfig) -> dict[str, Any]:
    if kind == "qwen2":
        return {"qkv_bias": True, "o_bias": False, "mlp_bias": False}
    if kind == "internlm3":
        # The published code has one switch for q, k and v, and one for all other projections.
        qkv = bool(values.get("qkv_bias", values.get("attention_bias", False)))
        other = bool(values.get("bias", values.get("mlp_bias", False)))
        return {"qkv_bias": qkv, "o_bias": other, "mlp_bias": other}
    if kind in ("mixtral", "qwen2_moe"):
        return {"qkv_bias": kind == "qwen2_moe" and config.qkv_bias, "o_bias": False, "mlp_bias": False}
    attention = bool(getattr(config, "attention_bias", False))
    if kind == "glm4_moe":
        return {"qkv_bias": attention, "o_bias": False, "mlp_bias": False}
    return {"qkv_bias": attention, "o_bias": attention, "mlp_bias": bool(getattr(config, "mlp_bias", False))}


def _windows(kind: str, config: PretrainedConfig, refused: list[str]) -> dict[str, Any]:
    window = getattr(config, "sliding_window", None)
    kinds = list(getattr(config, "layer_types", None) or [])
    if kind == "mistral":
        kinds = kinds or ["sliding_attention"] * config.num_hidden_layers
    if kind in ("mixtral", "qwen3_moe"):
        # These classes do not read layer_types.
        kinds = ["sliding_attention"] * config.num_hidden_layers
    if kind == "gpt_oss" and not set(kinds) - {"full_attention", "sliding_attention"}:
        return _alternating_windows(window, kinds, refused)
    if window is None or "sliding_attention" not in kinds:
        if set(kinds) - {"full_attention", "sliding_attention"}:
            refused.append(f"layer_types {sorted(set(kinds))}")
        return {}
    first = kinds.index("sliding_attention")
    if kinds != ["full_attention"] * first + ["sliding_attention"] * (config.num_hidden_layers - first):
        refused.append("layer_types: windows must be in all layers from some layer on")
    return {"use_sliding_window": True, "sliding_window": window, "max_window_layers": first}


def _alternating_windows(window: int | None, kinds: list[str], refused: list[str]) -> dict[str, Any]:
    """The keys for layers of which every n-th has full attention, and all others have a window."""
    if window is None or "sliding_attention" not in kinds:
        return {"sliding_window": None}
    full = [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]
    pattern = full[0] + 1 if full else len(kinds) + 1
    if pattern < 2 or full != list(range(pattern - 1, len(kinds), pattern)):
        refused.append("layer_types: full attention must be in every n-th layer")
    return {"sliding_window": window, "sliding_window_pattern": max(pattern, 2)}


Reader = Callable[[dict[str, Any], list[str]], "tuple[str, PretrainedConfig]"]


def _own_class(model_type: str, class_name: str) -> Reader:
    """The reader of a family with a class in transformers."""

    def read(values: dict[str, Any], refused: list[str]) -> tuple[str, PretrainedConfig]:
        import transformers

        return model_type, getattr(transformers, class_name).from_dict(values)

    return read


def _as_llama(values: Mapping[str, Any], required: tuple[str, ...] = (), **changes: Any) -> PretrainedConfig:
    """The keys of a family that computes the function of a Llama, as a config of transformers' Llama.

    Args:
        values: content of the config.json.
        required: further keys whose default in the family's own code differs from that of a Llama.
        changes: values of other keys.
    """
    import transformers

    required = _REQUIRED + required
    missing = [key for key in required if key not in values]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")
    shared = {key: values[key] for key in required + _KNOWN if key in values}
    return transformers.LlamaConfig.from_dict({**shared, **changes})


def _internlm(values: dict[str, Any], refused: list[str]) -> tuple[str, PretrainedConfig]:
    rotary = values.get("rotary") or {"type": "origin"}
    changes: dict[str, Any] = {"rope_theta": rotary.get("base", 10000.0)}
    if rotary.get("type") == "dynamic":
        changes["rope_scaling"] = {"rope_type": "dynamic", "factor": float(rotary.get("scaling_factor", 1.0))}
    elif rotary.get("type") != "origin":
        refused.append(f"rotary type '{rotary.get('type')}'")
    return "INTERNLM", _as_llama(values, attention_bias=bool(values.get("bias", True)), **changes)


def _internlm2(values: dict[str, Any], refused: list[str]) -> tuple[str, PretrainedConfig]:
    return "INTERNLM2", _as_llama(values, attention_bias=bool(values.get("bias", True)))


def _internlm3(values: dict[str, Any], refused: list[str]) -> tuple[str, PretrainedConfig]:
    return "INTERNLM3", _as_llama(values, ("num_key_value_heads", "head_dim"))


def _baichuan2(values: dict[str, Any], refused: list[str]) -> tuple[str, PretrainedConfig]:
    if "max_position_embeddings" not in values:
        refused.append("ALiBi positions (Baichuan 13B, which names no max_position_embeddings)")
    if "BaiChuanForCausalLM" in (values.get("architectures") or []):
        refused.append("Baichuan of the first generation, whose head is not normalized")
    return "BAICHUAN2", _as_llama(values)


_READERS: dict[str, Reader] = {
    "llama": _own_class("LLAMA2", "LlamaConfig"),
    "mistral": _own_class("MISTRAL", "MistralConfig"),
    "qwen2": _own_class("QWEN2", "Qwen2Config"),
    "qwen3": _own_class("QWEN3", "Qwen3Config"),
    "gemma": _own_class("GEMMA", "GemmaConfig"),
    "mixtral": _own_class(MODEL_TYPES["mixtral"], "MixtralConfig"),
    "qwen2_moe": _own_class(MODEL_TYPES["qwen2_moe"], "Qwen2MoeConfig"),
    "qwen3_moe": _own_class(MODEL_TYPES["qwen3_moe"], "Qwen3MoeConfig"),
    **{kind: _own_class(one.model_type, one.class_name) for kind, one in CLASSES.items()},
    "internlm": _internlm,
    "internlm2": _internlm2,
    "internlm3": _internlm3,
    "baichuan": _baichuan2,
}
