"""Translates the config.json of transformers' LlavaForConditionalGeneration, in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from internlm.config.schema import ModelConfig
from internlm.model.huggingface.from_config import HfModel, from_hf_config
from internlm.model.huggingface.to_config import transformers_config_json
from internlm.model.llava.model import Llava
from internlm.model.llava.projector import num_linear_layers
from internlm.utils.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MODEL_TYPE = "llava"
"""`model_type` in the config.json."""

_LIKE_LLAMA = ("LLAMA2", "MISTRAL", "QWEN2", "QWEN3")
"""Families whose function is that of a LLaVA's decoder, if all keys are given."""

_SHARED = ("tie_word_embeddings", "quantization_config")
"""Keys of the config.json that describe its text model too."""


def text_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the language model inside of a LLaVA."""
    text = dict(values.get("text_config") or {})
    text.setdefault("model_type", "llama")
    text.pop("architectures", None)
    return {**text, **{key: values[key] for key in _SHARED if values.get(key)}}


def from_llava_config(values: Mapping[str, Any], where: str) -> HfModel:
    """The keys of a LLaVA model; see `from_hf_config`.

    Raises:
        ConfigError: the tower, the projector or the language model is not supported.
    """
    import transformers

    try:
        config = transformers.LlavaConfig.from_dict(dict(values))
    except Exception as error:
        raise ConfigError(f"{where}: transformers cannot read it: {error!r}") from error
    vision = cast("PretrainedConfig", config.vision_config)
    kind, strategy = vision.model_type, config.vision_feature_select_strategy
    refused = {
        f"projector_hidden_act '{config.projector_hidden_act}'": config.projector_hidden_act != "gelu",
        "multimodal_projector_bias = false": not config.multimodal_projector_bias,
        "several layers in vision_feature_layer": not isinstance(config.vision_feature_layer, int),
        "vision_feature_select_strategy 'default', which leaves out the first patch of a SigLIP tower": kind
        == "siglip_vision_model"
        and strategy == "default",
    }
    if any(refused.values()):
        raise ConfigError(f"{where}: not supported: {', '.join(what for what, applies in refused.items() if applies)}")
    text = from_hf_config(text_values(values), f"{where}, text_config")
    if text.model_type not in _LIKE_LLAMA:
        raise ConfigError(f"{where}: a LLaVA with the language model {text.model_type} is not supported")
    keeps_class = strategy == "full" and kind == "clip_vision_model"
    keys = {
        **text.keys,
        # A property of the family, without a key in its config.json.
        **({"qk_norm": True} if text.model_type == "QWEN3" else {}),
        "image_token_id": config.image_token_id,
        "vit_cfg": {
            "config": {**vision.to_diff_dict(), "model_type": kind},
            "mm_vision_select_layer": config.vision_feature_layer,
            "mm_vision_select_feature": "cls_patch" if keeps_class else "patch",
        },
        "vision_proj_cfg": {"mm_projector_type": "mlp2x_gelu"},
    }
    dtype = values.get("dtype", values.get("torch_dtype"))
    return HfModel("LLAVA", keys, f"torch.{dtype}" if dtype else text.dtype, text.notices)


def llava_config_json(model: Llava, section: ModelConfig) -> dict[str, Any]:
    """The config.json of LlavaForConditionalGeneration; the inverse of `from_llava_config`.

    Args:
        model: the whole model.
        section: the `model` section that it was built from.

    Raises:
        ConfigError: transformers' class has no such projector, or no class for the language model.
    """
    assert section.vit_cfg is not None and section.vision_proj_cfg is not None
    kind = section.vision_proj_cfg.mm_projector_type
    if num_linear_layers(kind) != 2:
        raise ConfigError(
            f"model.vision_proj_cfg.mm_projector_type = '{kind}': transformers' LLaVA has two linear layers, as "
            "'mlp2x_gelu' has"
        )
    text = transformers_config_json(model.architecture)
    text.pop("architectures")
    skips_class = model.vision.has_class_token and section.vit_cfg.mm_vision_select_feature == "patch"
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": MODEL_TYPE,
        "image_token_index": section.image_token_id,
        "image_seq_length": model.vision.tokens_per_image,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": section.vit_cfg.mm_vision_select_layer,
        "vision_feature_select_strategy": "default" if skips_class else "full",
        "tie_word_embeddings": model.architecture.tie_word_embeddings,
        "dtype": text["dtype"],
        "torch_dtype": text["torch_dtype"],
        "text_config": text,
        "vision_config": {**model.vision.config.to_diff_dict(), "model_type": model.vision.config.model_type},
    }
