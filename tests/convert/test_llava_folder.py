"""Folders of LLaVA models go to a checkpoint and back, bit for bit, and transformers computes the same with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.llava import CLIP, SIGLIP
from safetensors.torch import load_file, save_file

from internlm.checkpoint.load_model import load_model_for_inference
from internlm.checkpoint.reading import read_config
from internlm.convert.from_hf import convert_from_hf
from internlm.convert.llava_folder import vision_name
from internlm.convert.to_hf import convert_to_hf
from internlm.model.llava.model import Llava
from internlm.utils.errors import CheckpointError, ConfigError
from internlm.utils.storage import storage_path

TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def write_folder(path: Path, tower: dict[str, Any] = CLIP, **changes: Any) -> Any:
    """A folder that transformers writes, and its model."""
    import transformers

    kinds = {"clip_vision_model": transformers.CLIPVisionConfig, "siglip_vision_model": transformers.SiglipVisionConfig}
    values = {"vision_feature_select_strategy": "full", "image_seq_length": 4, **changes}
    config = transformers.LlavaConfig(
        vision_config=kinds[tower["model_type"]](**tower),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=63,
        **values,
    )
    torch.manual_seed(1)
    model = transformers.LlavaForConditionalGeneration(config)
    model.save_pretrained(path)
    return model


def round_trip(source: Path, tmp_path: Path) -> Path:
    checkpoint = convert_from_hf(storage_path(source), storage_path(tmp_path / "checkpoint"))
    convert_to_hf(checkpoint, storage_path(tmp_path / "out"))
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("tower", "strategy", "select"),
    [(CLIP, "default", "patch"), (CLIP, "full", "cls_patch"), (SIGLIP, "full", "patch")],
)
def test_a_folder_goes_round_bit_for_bit(tmp_path: Path, tower: dict[str, Any], strategy: str, select: str) -> None:
    import transformers

    model = write_folder(tmp_path / "in", tower, vision_feature_select_strategy=strategy)
    out = round_trip(tmp_path / "in", tmp_path)
    config = read_config(storage_path(tmp_path / "checkpoint" / "0"))
    assert (config.model_type, config.model.image_token_id) == ("LLAVA", 63)
    assert config.model.vit_cfg is not None and config.model.vit_cfg.mm_vision_select_feature == select
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "in", out))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    loaded = transformers.LlavaForConditionalGeneration.from_pretrained(out)
    tokens = 5 if select == "cls_patch" else 4
    ids = torch.tensor([[5, *[63] * tokens, 7, 8]])
    images = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = model.eval()(input_ids=ids, pixel_values=images).logits
    assert torch.equal(loaded.eval()(input_ids=ids, pixel_values=images).logits, expected)


def test_older_names_are_read(tmp_path: Path) -> None:
    write_folder(tmp_path / "in")
    path = tmp_path / "in" / "model.safetensors"
    tensors = load_file(path)
    older = {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in tensors.items()}
    older["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    save_file(older, path, {"format": "pt"})
    after = load_file(round_trip(tmp_path / "in", tmp_path) / "model.safetensors")
    assert tensors.keys() == after.keys()
    assert all(torch.equal(tensors[name], after[name]) for name in tensors)


def test_names_in_memory_are_read() -> None:
    assert vision_name("model.vision_tower.post_layernorm.bias") == "vision_tower.post_layernorm.bias"
    assert vision_name("model.multi_modal_projector.linear_1.bias") == "vision_proj.linear_1.bias"
    assert vision_name("model.language_model.layers.0.input_layernorm.weight") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projector_hidden_act": "relu"}, "projector_hidden_act 'relu'"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias = false"),
        ({"vision_feature_layer": [-2, -1]}, "several layers in vision_feature_layer"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_folder(tmp_path / "in")
    path = tmp_path / "in" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ConfigError, match=message):
        convert_from_hf(storage_path(tmp_path / "in"), storage_path(tmp_path / "checkpoint"))


def test_a_missing_weight_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "in")
    path = tmp_path / "in" / "model.safetensors"
    tensors = load_file(path)
    del tensors["multi_modal_projector.linear_1.bias"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'multi_modal_projector.linear_1.bias' is missing"):
        convert_from_hf(storage_path(tmp_path / "in"), storage_path(tmp_path / "checkpoint"))


@pytest.mark.parametrize("family", ["Qwen2Config", "Qwen3Config", "MistralConfig"])
def test_other_language_models_compute_what_transformers_computes(tmp_path: Path, family: str) -> None:
    import transformers

    own: dict[str, Any] = {"MistralConfig": {"sliding_window": None}, "Qwen3Config": {"head_dim": 8}}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**{key: CLIP[key] for key in CLIP if key != "model_type"}),
        text_config=getattr(transformers, family)(**TEXT, **own.get(family, {})),
        image_token_index=63,
        image_seq_length=4,
    )
    torch.manual_seed(0)
    theirs = transformers.LlavaForConditionalGeneration(config).eval()
    for parameter in theirs.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path / "in")
    out = round_trip(tmp_path / "in", tmp_path)
    model, _ = load_model_for_inference(str(tmp_path / "checkpoint"), torch.device("cpu"))
    assert isinstance(model, Llava)
    ids, images = torch.tensor([[5, 63, 63, 63, 63, 7, 8]]), torch.randn(1, 3, 8, 8)
    extra = {"image_features": torch.tensor([[-1, 0, 1, 2, 3, -1, -1]])}
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values=images).logits
        hidden = model(ids.masked_fill(ids == 63, 0), torch.arange(7)[None], images=images, extra=extra)
        loaded = transformers.LlavaForConditionalGeneration.from_pretrained(out).eval()
        assert torch.equal(loaded(input_ids=ids, pixel_values=images).logits, expected)
    torch.testing.assert_close(model.logits(hidden), expected, rtol=1e-5, atol=1e-5)
