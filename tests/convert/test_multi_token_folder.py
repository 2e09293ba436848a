"""Layers that predict later tokens in Hugging Face folders, as in DeepSeek-V3's."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hf_folders import save_native, tensors_of
from safetensors.torch import save_file
from torch import Tensor

from internlm.checkpoint.reading import read_config
from internlm.checkpoint.tensor_files import TensorReader
from internlm.convert import to_hf
from internlm.convert.from_hf import architecture_of, convert_from_hf
from internlm.convert.to_hf import convert_to_hf
from internlm.utils.errors import CheckpointError
from internlm.utils.storage import storage_path


def folder_of(path: Path, name: str) -> dict[str, Tensor]:
    """A folder whose model has a layer of multi-token prediction behind its two layers."""
    save_native(name, path)
    weights = tensors_of(path)
    later = {n.replace("layers.1.", "layers.2."): t + 1 for n, t in weights.items() if ".layers.1." in n}
    size = weights["model.norm.weight"].shape[0]
    later |= {f"model.layers.2.{n}.weight": torch.rand(size) for n in ("enorm", "hnorm", "shared_head.norm")}
    later["model.layers.2.eh_proj.weight"] = torch.rand(size, 2 * size)
    later["model.layers.2.embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
    later["model.layers.2.shared_head.head.weight"] = weights["lm_head.weight"].clone()
    rewrite(path, {**weights, **later}, num_nextn_predict_layers=1)
    return {**weights, **later}


def rewrite(path: Path, weights: dict[str, Tensor], **keys: Any) -> None:
    for file in path.glob("*.safetensors*"):
        file.unlink()
    save_file(weights, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **keys}))


@pytest.mark.parametrize("name", ["deepseek-v3", "glm4-moe"])
def test_they_go_both_ways(name: str, tmp_path: Path) -> None:
    weights = folder_of(tmp_path / "hf", name)
    convert_from_hf(storage_path(tmp_path / "hf"), storage_path(tmp_path / "new"))
    convert_to_hf(storage_path(tmp_path / "new/0"), storage_path(tmp_path / "back"), tokenizer=False)
    back = tensors_of(tmp_path / "back")
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[n], weights[n].to(back[n].dtype)) for n in weights)
    assert json.loads((tmp_path / "back/config.json").read_text())["num_nextn_predict_layers"] == 1


def test_a_family_without_them_leaves_them_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    weights = folder_of(tmp_path / "hf", "deepseek-v3")
    convert_from_hf(storage_path(tmp_path / "hf"), storage_path(tmp_path / "new"))
    monkeypatch.setattr(to_hf, "has_multi_token_form", lambda architecture: False)
    convert_to_hf(storage_path(tmp_path / "new/0"), storage_path(tmp_path / "back"), tokenizer=False)
    assert tensors_of(tmp_path / "back").keys() == {name for name in weights if ".layers.2." not in name}
    assert "left out: the 1 layer(s) that predict later tokens" in caplog.text


def test_more_of_them_than_the_config_says_are_refused(tmp_path: Path) -> None:
    weights = folder_of(tmp_path / "hf", "glm4-moe")
    convert_from_hf(storage_path(tmp_path / "hf"), storage_path(tmp_path / "new"))
    checkpoint = storage_path(tmp_path / "new/0")
    architecture = dataclasses.replace(architecture_of(read_config(checkpoint)), num_multi_token=0)
    with pytest.raises(CheckpointError, match=r"'layers\.2\.\S+' is not a weight of this model"):
        to_hf.hf_tensors(TensorReader(checkpoint), architecture, "transformers", None)
    more = {name.replace("layers.2.", "layers.3."): tensor.clone() for name, tensor in weights.items()}
    rewrite(tmp_path / "hf", {**more, **weights})
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\."):
        convert_from_hf(storage_path(tmp_path / "hf"), storage_path(tmp_path / "second"))


def test_a_copy_that_differs_is_refused_or_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = folder_of(tmp_path / "hf", "deepseek-v3")
    weights["model.layers.2.embed_tokens.weight"][0, 0] += 1
    rewrite(tmp_path / "hf", weights)
    reason = r"must be a copy of 'model\.embed_tokens\.weight', but differs from it.*set num_nextn_predict_layers to 0"
    with pytest.raises(CheckpointError, match=reason):
        convert_from_hf(storage_path(tmp_path / "hf"), storage_path(tmp_path / "new"))
    rewrite(tmp_path / "hf", weights, num_nextn_predict_layers=0)
    convert_from_hf(storage_path(tmp_path / "hf"), storage_path(tmp_path / "new"))
    assert "num_nextn_predict_layers = 0: layers of multi-token prediction are not imported" in caplog.text
    convert_to_hf(storage_path(tmp_path / "new/0"), storage_path(tmp_path / "back"), tokenizer=False)
    assert tensors_of(tmp_path / "back").keys() == {name for name in weights if ".layers.2." not in name}


def test_layers_beyond_the_config_are_no_such_layers(tmp_path: Path) -> None:
    """`num_nextn_predict_layers` 0 leaves out the layers of that kind alone."""
    save_native("glm4-moe", tmp_path / "hf")
    assert json.loads((tmp_path / "hf/config.json").read_text())["num_nextn_predict_layers"] == 0
    weights = tensors_of(tmp_path / "hf")
    later = {n.replace("layers.1.", "layers.2."): t.clone() for n, t in weights.items() if ".layers.1." in n}
    rewrite(tmp_path / "hf", {**weights, **later})
    with pytest.raises(CheckpointError, match=r"'model\.layers\.2\..*' is not described by config\.json"):
        convert_from_hf(storage_path(tmp_path / "hf"), storage_path(tmp_path / "new"))
