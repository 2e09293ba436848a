"""gpt-oss with experts in MXFP4, as published; transformers' dequantization is the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hf_folders import (
    NATIVE,
    SIZES,
    assert_same_logits,
    assert_same_tensors,
    load_native,
    random_tokens,
    tensors_of,
)
from safetensors.torch import save_file
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from internlm.checkpoint.load_model import load_model_for_inference
from internlm.convert import hf_folder
from internlm.convert.from_hf import convert_from_hf
from internlm.convert.hf_folder import HfFolder
from internlm.convert.mxfp4 import dequantize
from internlm.convert.to_hf import convert_to_hf
from internlm.utils.errors import CheckpointError, ConfigError
from internlm.utils.storage import storage_path

EXPERTS = ("gate_up_proj", "down_proj")


def test_every_byte_with_every_scale_is_that_of_transformers() -> None:
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 255, 1, 1)
    scales = torch.arange(255, dtype=torch.uint8).view(1, 255, 1).repeat(2, 1, 16)
    scales[1] = scales[1].flip(0)
    found, expected = dequantize(blocks, scales), convert_moe_packed_tensors(blocks, scales)
    assert found.dtype == torch.bfloat16 and found.shape == (2, 512, 255)
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))
    # Each of 16 elements is 32 times in a row. With the scale 2^127 those from 2 on overflow, with 2^126 those from 4.
    assert found[found > 0].min() == 2.0**-128
    assert found[found.isfinite()].max() == 1.5 * 2.0**127
    assert found.isinf().sum() == 2 * 32 * (8 + 4)


def test_a_scale_that_is_no_number_gives_none() -> None:
    scales = torch.tensor([[[255, 127]]], dtype=torch.uint8)
    weight = dequantize(torch.full((1, 1, 2, 16), 0x21, dtype=torch.uint8), scales)
    assert weight[0, :32].isnan().all()
    assert weight[0, 32:].flatten().tolist() == [0.5, 1.0] * 16


def published_folder(folder: Path, **config: Any) -> dict[str, Tensor]:
    """A tiny gpt-oss as published, in bf16 with experts in MXFP4.

    Returns:
        Name -> tensor of the same model in bf16, dequantized by transformers.
    """
    keys = {**SIZES, **NATIVE["gpt-oss"][1], "hidden_size": 64, "intermediate_size": 96, "pad_token_id": None}
    torch.manual_seed(0)
    model = GptOssForCausalLM(GptOssConfig(**keys)).to(torch.bfloat16)
    model.save_pretrained(folder)
    stored = tensors_of(folder)
    dense = dict(stored)
    for name in [name for name in stored if name.endswith(EXPERTS)]:
        experts, inputs, outputs = stored.pop(name).shape
        blocks = torch.randint(256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 124, (experts, outputs, inputs // 32), dtype=torch.uint8)
        dense[name] = convert_moe_packed_tensors(blocks, scales)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(stored, folder / "model.safetensors")
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    edit_config(folder, **{"quantization_config": quantization, **config})
    return dense


def edit_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))


def rewrite(folder: Path, **changes: Tensor | None) -> None:
    """Write other tensors for some of the first layer's experts; None removes one."""
    names = {f"model.layers.0.mlp.experts.{name}": tensor for name, tensor in changes.items()}
    tensors = {**tensors_of(folder), **names}
    save_file({n: t for n, t in tensors.items() if t is not None}, folder / "model.safetensors")


def convert(folder: Path, **options: Any) -> None:
    convert_from_hf(storage_path(folder), storage_path(folder.parent / "ours"), **options)


def test_the_import_is_exact_and_exports_in_bf16(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = published_folder(tmp_path / "hf")
    convert(tmp_path / "hf")
    assert "4 weights in MXFP4 are dequantized to bf16, exactly; an export has them in bf16" in caplog.text
    convert_to_hf(storage_path(tmp_path / "ours/0"), storage_path(tmp_path / "back"), tokenizer=False)
    back = tensors_of(tmp_path / "back")
    assert_same_tensors(back, {name: tensor.to(back[name].dtype) for name, tensor in expected.items()})
    assert {back[name].dtype for name in back if name.endswith(EXPERTS)} == {torch.bfloat16}
    assert "quantization_config" not in json.loads((tmp_path / "back/config.json").read_text())


def test_the_import_computes_what_transformers_does(tmp_path: Path) -> None:
    """transformers dequantizes the folder itself, where it has no kernels for MXFP4."""
    published_folder(tmp_path / "hf")
    convert(tmp_path / "hf", dtype=torch.float32)
    theirs = load_native(tmp_path / "hf").float()
    ours, _ = load_model_for_inference(storage_path(tmp_path / "ours/0"))
    tokens = random_tokens(2, 16)
    with torch.no_grad():
        assert_same_logits(ours.logits(ours(tokens, torch.arange(16).expand(2, 16))), theirs(tokens).logits)


def test_each_quantized_weight_is_read_once_when_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published_folder(tmp_path / "hf")
    read: list[str] = []
    tensor_read = hf_folder.HfFolder._read

    def recorded(folder: HfFolder, name: str, entry: hf_folder.HfEntry) -> Tensor:
        read.append(name.rpartition(".")[2])
        return tensor_read(folder, name, entry)

    monkeypatch.setattr(hf_folder.HfFolder, "_read", recorded)
    convert(tmp_path / "hf")
    quantized = [name for name in read if name.endswith(("_blocks", "_scales"))]
    assert quantized == 2 * [f"{name}{part}" for name in EXPERTS for part in ("_blocks", "_scales")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"down_proj_scales": None}, "down_proj_scales' is missing, without which '.*down_proj' cannot be dequantized"),
        ({"gate_up_proj_blocks": None}, "gate_up_proj_blocks' is missing"),
        ({"down_proj_scales": torch.zeros(5, 64, 2, dtype=torch.uint8)}, "are not a weight in MXFP4"),
        ({"down_proj_scales": torch.zeros(5, 64, 3)}, r"down_proj_scales' torch.float32 \[5, 64, 3\] are not a weight"),
        (
            {
                "down_proj_blocks": torch.zeros(5, 64, 2, 16, dtype=torch.uint8),
                "down_proj_scales": torch.zeros(5, 64, 2, dtype=torch.uint8),
            },
            r"'model.layers.0.mlp.experts.down_proj' has shape \[5, 64, 64\], the model needs \[5, 96, 64\]",
        ),
        (
            {"down_proj_scales": torch.full((5, 64, 3), 255, dtype=torch.uint8)},
            "layers.0.feed_forward.experts.w2' .*(nan|NaN)",
        ),
    ],
    ids=["no scales", "no blocks", "other groups", "float scales", "other shape", "not a number"],
)
def test_damaged_weights_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    published_folder(tmp_path / "hf")
    rewrite(tmp_path / "hf", **changes)
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "hf")


def test_another_quantization_is_refused_by_name(tmp_path: Path) -> None:
    published_folder(tmp_path / "hf", quantization_config={"quant_method": "fp8"})
    with pytest.raises(ConfigError, match="not supported: quantization_config with quant_method 'fp8'"):
        convert(tmp_path / "hf")
    edit_config(tmp_path / "hf", quantization_config=None)
    with pytest.raises(CheckpointError, match=r"(blocks|scales)' is stored as torch.uint8"):
        convert(tmp_path / "hf")
