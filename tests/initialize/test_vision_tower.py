"""What a run on pictures starts from: a vision tower, a language model, a projector; and what it trains."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import write_config
from helpers.llava import CLIP, SIGLIP
from torch import nn

from internlm.config.loader import load_config
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.trainer import Trainer
from internlm.initialize.build import build_layout, build_trainer
from internlm.utils.errors import CheckpointError, ConfigError

MODEL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_layers": 2,
    "num_attention_heads": 4,
    "num_kv_attention_heads": 2,
    "intermediate_size": 48,
    "dtype": "torch.float32",
    "image_token_id": 200000,
    "vision_proj_cfg": {},
}


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.LogCaptureFixture]:
    monkeypatch.setattr(logging.getLogger("internlm"), "propagate", True)
    with caplog.at_level(logging.INFO, "internlm"):
        yield caplog


def new(folder: Path, vit_cfg: dict[str, Any], **changes: Any) -> Trainer:
    values = {"model_type": "LLAVA", "model": {**MODEL, "vit_cfg": vit_cfg}, "data__total_steps": 1, **changes}
    loaded = load_config(write_config(folder), [f"{key.replace('__', '.')}={value}" for key, value in values.items()])
    return build_trainer(loaded.config, ParallelContext.create(build_layout(loaded.config, 1)), folder / "run")


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.engine.model.state_dict().items()}


def tower(folder: Path, kind: str) -> nn.Module:
    """A folder of a tower, alone or with its text model."""
    import transformers

    torch.manual_seed(2)
    vision = {key: value for key, value in CLIP.items() if key != "model_type"}
    model: Any
    if kind == "clip":
        text = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = transformers.CLIPConfig(vision_config=vision, text_config={**text, "vocab_size": 20})
        model = transformers.CLIPModel(config)
    elif kind == "clip_vision_model":
        model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**vision))
    else:
        model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**{**SIGLIP, "model_type": kind}))
    model.save_pretrained(folder)
    return model.vision_model if kind == "clip" else model


@pytest.mark.parametrize("kind", ["clip", "clip_vision_model", "siglip_vision_model"])
def test_a_tower_is_loaded_from_its_folder(tmp_path: Path, told: pytest.LogCaptureFixture, kind: str) -> None:
    expected = tower(tmp_path / "tower", kind).state_dict()
    found = weights(new(tmp_path, {"mm_vision_tower": str(tmp_path / "tower")}))
    names = [name for name in found if name.startswith("vision_tower.")]
    assert len(names) > 20
    assert all(torch.equal(found[name], expected[name.removeprefix("vision_tower.")]) for name in names)
    assert f"the vision tower is loaded from {tmp_path / 'tower'} (model.safetensors)" in told.text
    assert "the vision tower is frozen" in told.text


def test_a_language_model_is_loaded_behind_a_tower(tmp_path: Path, told: pytest.LogCaptureFixture) -> None:
    import transformers

    tower(tmp_path / "tower", "clip_vision_model")
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **sizes, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5, max_position_embeddings=2048
        )
    )
    text.save_pretrained(tmp_path / "text")
    vit_cfg = {"mm_vision_tower": str(tmp_path / "tower")}
    start = weights(new(tmp_path, vit_cfg))
    load = {"path": str(tmp_path / "text"), "content": ("model",), "ckpt_type": "hf"}
    found = weights(new(tmp_path, vit_cfg, ckpt__load_ckpt_info=load))
    assert torch.equal(found["tok_embeddings.weight"], text.model.embed_tokens.weight)
    assert torch.equal(found["layers.1.feed_forward.w2.weight"], text.model.layers[1].mlp.down_proj.weight)
    assert all(torch.equal(found[name], start[name]) for name in found if name.startswith("vision"))
    assert "is a language model without vision; the projector keeps its initial values" in told.text


def test_a_resumed_run_keeps_its_own_tower(tmp_path: Path) -> None:
    groups = [{"match": "vision_tower.*", "lr_factor": 0.5}]
    tower(tmp_path / "tower", "clip_vision_model")
    vit_cfg = {"mm_vision_tower": str(tmp_path / "tower")}
    trainer = new(tmp_path, vit_cfg, optimizer__groups=groups, adam__weight_decay=0.5)
    before = weights(trainer)
    trainer.fit()
    after = weights(trainer)
    # Without pictures in the data, only weight decay changes the tower; what no feature depends on stays.
    name = "vision_tower.encoder.layers.{}.mlp.fc1.weight"
    assert not torch.equal(before[name.format(0)], after[name.format(0)])
    assert torch.equal(before[name.format(2)], after[name.format(2)])
    resumed = weights(new(tmp_path, vit_cfg, optimizer__groups=groups, data__total_steps=2))
    assert all(torch.equal(resumed[name], after[name]) for name in after)


def test_a_tower_without_some_weights_is_an_error(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tower(tmp_path / "tower", "clip_vision_model")
    path = tmp_path / "tower" / "model.safetensors"
    tensors = load_file(path)
    del tensors["pre_layrnorm.bias"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 weights, such as 'pre_layrnorm.bias'"):
        new(tmp_path, {"mm_vision_tower": str(tmp_path / "tower")})


def test_a_changed_tower_is_another_function(tmp_path: Path) -> None:
    new(tmp_path, {"config": CLIP}).fit()
    with pytest.raises(CheckpointError, match=r"mm_vision_select_layer"):
        new(tmp_path, {"config": CLIP, "mm_vision_select_layer": -1}, data__total_steps=2)


def test_patterns_that_do_not_name_the_tower_leave_it_frozen(tmp_path: Path) -> None:
    groups = [{"match": "*.bias", "weight_decay": 0.0}, {"match": "vision_proj.*", "lr_factor": 2.0}]
    model = new(tmp_path, {"config": CLIP}, optimizer__groups=groups).engine.model
    assert not any(parameter.requires_grad for parameter in model.vision_tower.parameters())
    assert all(parameter.requires_grad for parameter in model.vision_proj.parameters())


def test_a_stated_configuration_is_that_of_the_folder(tmp_path: Path) -> None:
    tower(tmp_path / "tower", "clip")
    vit_cfg = {"mm_vision_tower": str(tmp_path / "tower"), "config": CLIP}
    new(tmp_path, vit_cfg)
    with pytest.raises(ConfigError, match=r"hidden_act: 'quick_gelu' in the folder, 'gelu' in the config"):
        new(tmp_path, {**vit_cfg, "config": {**CLIP, "hidden_act": "gelu"}})
    with pytest.raises(ConfigError, match="give mm_vision_tower"):
        new(tmp_path, {})
