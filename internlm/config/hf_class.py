"""The `model` section of `model_type = "hf"`, filled from the config of a class of transformers that `hf` names."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internlm.utils.errors import ConfigError
from internlm.utils.hf_classes import config_object

SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_kv_attention_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "max_position_embeddings": "max_position_embeddings",
    "tie_word_embeddings": "tie_word_embeddings",
}
"""Key of the model section -> attribute of a config of transformers."""

_REQUIRED = ("vocab_size", "hidden_size", "num_layers", "num_attention_heads")

_HONOURED = {
    *SIZES,
    "dtype",
    "use_flash_attn",
    "attention_backend",
    "checkpoint",
    "checkpoint_save_policy",
    "checkpoint_budget",
    "compile",
    "num_chunks",
    "embed_split_hidden",
    "parallel_output",
    "device",
    "inject_info",
    "hf_class",
}
"""Keys of the model section that do the same for a Hugging Face class as for any model."""

_LEFT_OUT = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "quantization_config")
"""Keys of a config.json that describe its files, and neither the model nor what a run trains."""

_DEQUANTIZED = "mxfp4"
"""The `quant_method` of weights that are dequantized when they are loaded."""


def filled_model_section(hf: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """The model section with the sizes of the class.

    Args:
        hf: the `hf` section as given.
        model: the `model` section as given.

    Raises:
        ConfigError: the class is not found, or a given value contradicts it or would have no effect.
    """
    config, hf_class = _describe(hf)
    found = {key: _size(config, attribute) for key, attribute in SIZES.items()}
    missing = [SIZES[key] for key in _REQUIRED if found[key] is None]
    if missing:
        raise ConfigError(
            f"hf: a {type(config).__name__} has no {', '.join(missing)}; only decoders with attention are trained"
        )
    empty = [f"{SIZES[key]} = {found[key]}" for key in _REQUIRED if found[key] < 1]
    if empty:
        raise ConfigError(f"hf: the config of the class says {', '.join(empty)}, where at least 1 is needed")
    problems = [
        f"model.{key} = {model[key]!r}: the config of the class says {found[key]!r} ({SIZES[key]}); leave the key out"
        for key in SIZES
        if model.get(key) is not None and found[key] is not None and model[key] != found[key]
    ]
    problems += [
        f"model.{key} = {value!r} has no effect on a Hugging Face class, which computes as its own config says; set "
        "what you want in hf.cfg_extra_kwargs and leave the key out"
        for key, value in model.items()
        if key not in _HONOURED
    ]
    if problems:
        raise ConfigError(problems)
    sizes = {key: value for key, value in found.items() if value is not None}
    return {**sizes, **model, "hf_class": hf_class}


def small_sizes(*, heads: int, kv_heads: int, layers: int, window: int, head_dim: int = 8) -> dict[str, Any]:
    """Attributes of a config of transformers for a small copy of a class."""
    return {
        "num_hidden_layers": layers,
        "hidden_size": head_dim * heads,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": 7 * head_dim * heads,
        # Of latent attention, whose `head_dim` is that of the rotary channels.
        "qk_rope_head_dim": head_dim,
        "qk_nope_head_dim": head_dim,
        "v_head_dim": head_dim,
        "q_lora_rank": 2 * head_dim,
        "kv_lora_rank": 2 * head_dim,
        "moe_intermediate_size": 5 * head_dim,
        "n_group": 2,
        "topk_group": 1,
        "num_experts": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        # Odd, so that ranks do not divide it.
        "vocab_size": 64 * heads + 1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "sliding_window": window,
        "max_window_layers": 1,
    }


def resized_model_section(hf_class: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the model section for the same class with other sizes; for `internlm verify`.

    Args:
        hf_class: content of `model.hf_class`.
        sizes: attribute of a config of transformers -> value; attributes that the class lacks are left out. Lists with
            an entry for each layer are cut.
    """
    config = config_object(hf_class)
    names = getattr(config, "attribute_map", {})
    values = dict(hf_class["config"])
    num_layers = getattr(config, "num_hidden_layers")  # noqa: B009 (any class)
    layers = sizes.get("num_hidden_layers", num_layers)
    for name, value in values.items():
        if isinstance(value, list) and len(value) == num_layers:
            values[name] = value[:layers]
    for name, value in sizes.items():
        if values.get(names.get(name, name)) is not None:
            values[names.get(name, name)] = value
    changed = type(config).from_dict(values)
    found = {key: _size(changed, attribute) for key, attribute in SIZES.items()}
    return {**found, "hf_class": {**hf_class, "config": values}}


def _describe(hf: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(config object, content of `model.hf_class`)."""
    folder, module = hf.get("folder"), hf.get("cfg")
    folder = folder if folder is None else os.path.expanduser(str(folder))
    if (folder is None) == (module is None):
        raise ConfigError(
            "model_type = 'hf': name the class either by hf.folder, a folder with config.json, or by hf.cfg, "
            "hf.cfg_cls, hf.mod and hf.mod_cls"
        )
    try:
        importlib.import_module("transformers")
    except ImportError:
        raise ConfigError("model_type = 'hf' needs the package transformers: pip install transformers") from None
    extra = hf.get("cfg_extra_kwargs") or {}
    if not isinstance(extra, Mapping):
        raise ConfigError(f"hf.cfg_extra_kwargs = {extra!r}: it must be a dict of values of the class's config")
    config, code_folder = _from_folder(hf, str(folder)) if folder is not None else (_from_module(hf, extra), None)
    if folder is not None and extra:
        values = config.to_dict()
        unknown = [name for name in extra if name not in values and name != "quantization_config"]
        if unknown:
            raise ConfigError(f"hf.cfg_extra_kwargs: a {type(config).__name__} has no {', '.join(unknown)}")
        try:
            config = type(config).from_dict({**values, **extra})
        except Exception as error:  # The checks of any class run here.
            raise ConfigError(f"hf.cfg_extra_kwargs: a {type(config).__name__} refuses them: {error}") from error
    if config.get_text_config() is not config:
        raise ConfigError(f"hf: a {type(config).__name__} describes more than a language model, which is not supported")
    _check_quantization(config)
    model_class = _model_class(hf, config, code_folder)
    values = {key: value for key, value in config.to_dict().items() if key not in _LEFT_OUT}
    own = getattr(config, "auto_map", {}) if code_folder else {}
    config_class = own.get("AutoConfig") or f"{type(config).__module__}.{type(config).__name__}"
    described = {"model_class": model_class, "config_class": config_class, "config": json.loads(json.dumps(values))}
    return config, described | ({"code_folder": code_folder} if code_folder else {})


def _from_folder(hf: Mapping[str, Any], folder: str) -> tuple[Any, str | None]:
    """(config object, the folder if its code is used)."""
    from transformers import AutoConfig

    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ConfigError(f"hf.folder = '{folder}': there is no {path}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"hf.folder = '{folder}': {path} is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"hf.folder = '{folder}': {path} is no JSON object: it has none of the keys of a config")
    brings_code = "AutoModelForCausalLM" in (values.get("auto_map") or {})
    trusts = bool(hf.get("trust_remote_code", False))
    if brings_code and not trusts:
        raise ConfigError(
            f"hf.folder = '{folder}': its config.json names code of its own (auto_map). Read that code, and set "
            "hf.trust_remote_code = True to run it"
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trusts, local_files_only=True)
    except Exception as error:  # The checks of any class, and code of the folder, run here.
        raise ConfigError(
            f"hf.folder = '{folder}': transformers cannot read {path}: {type(error).__name__}: {error}"
        ) from error
    return config, folder if brings_code else None


def _from_module(hf: Mapping[str, Any], extra: Mapping[str, Any]) -> Any:
    missing = [f"hf.{key}" for key in ("cfg_cls", "mod", "mod_cls") if not hf.get(key)]
    if missing:
        raise ConfigError(f"hf.cfg = {hf['cfg']!r}: {', '.join(missing)} must name the other parts of the class")
    kind = _imported("cfg", hf["cfg"], "cfg_cls", hf["cfg_cls"])
    try:
        return kind(**extra)
    except Exception as error:  # The constructor of any class runs here.
        raise ConfigError(f"hf.cfg_extra_kwargs: {kind.__name__} refuses them: {error}") from error


def _model_class(hf: Mapping[str, Any], config: Any, code_folder: str | None) -> str:
    """Where the class of the model is: an import path, or a reference into the code of the folder."""
    if hf.get("mod"):
        if not hf.get("mod_cls"):
            raise ConfigError(f"hf.mod = {hf['mod']!r}: hf.mod_cls must name the class in it")
        kind = _imported("mod", hf["mod"], "mod_cls", hf["mod_cls"])
        if not hasattr(kind, "_from_config"):
            raise ConfigError(
                f"hf.mod_cls = {hf['mod_cls']!r} in {hf['mod']} is no model of transformers; name its ...ForCausalLM"
            )
        return f"{hf['mod']}.{hf['mod_cls']}"
    if code_folder is not None:
        return str(config.auto_map["AutoModelForCausalLM"])
    from transformers import AutoModelForCausalLM

    try:
        kind = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise ConfigError(
            f"hf: transformers has no language model for a {type(config).__name__}; name a class in hf.mod and "
            "hf.mod_cls"
        ) from None
    return f"{kind.__module__}.{kind.__name__}"  # type: ignore[attr-defined]


def _check_quantization(config: Any) -> None:
    """Refuse a config of quantized weights, which a run would train as if they were others."""
    quantization = getattr(config, "quantization_config", None)
    if not quantization:
        return
    values = quantization if isinstance(quantization, Mapping) else quantization.to_dict()
    method = values.get("quant_method")
    if method != _DEQUANTIZED:
        raise ConfigError(
            f"hf: the config has a quantization_config (quant_method = {method!r}), and weights are trained in "
            "model.dtype: name a folder with weights that are not quantized, or train from initial values with "
            "hf.cfg_extra_kwargs = dict(quantization_config=None)"
        )


def _imported(module_key: str, module: str, class_key: str, name: str) -> Any:
    try:
        found = importlib.import_module(module)
    except Exception as error:  # The code of any module runs here.
        raise ConfigError(
            f"hf.{module_key} = {module!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not hasattr(found, name):
        raise ConfigError(f"hf.{class_key} = {name!r}: there is no such class in {module}")
    return getattr(found, name)


def _size(config: Any, attribute: str) -> Any:
    try:
        value = getattr(config, attribute, None)
    except Exception:  # A config may refuse an attribute that differs between layers.
        return None
    return value if isinstance(value, int) else None
