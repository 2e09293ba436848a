"""Rules on documents with pictures."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.configs import small_config

from internlm.config.image_tokens import tokens_per_image
from internlm.config.rules import find_problems

LLAVA: dict[str, Any] = {
    "model_type": "LLAVA",
    "model.image_token_id": 64,
    "model.vit_cfg": {"mm_vision_tower": "tower"},
    "model.vision_proj_cfg": {},
    "data.is_multimodal": True,
    "data.image_size": 28,
    "data.patch_size": 14,
}


def texts_of(changes: dict[str, Any]) -> list[str]:
    """The problems of a config with changes to `LLAVA`; names without a section are keys of `data`."""
    outside = ("model_type", "model.")
    full = {name if name.startswith(outside) else f"data.{name}": value for name, value in changes.items()}
    return [problem.text for problem in find_problems(small_config(LLAVA | full), 1)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train_folder": "x"},
        {"train_folder": "x", "packing": "unpacked"},
        {"train_folder": "x", "type": "megatron", "packing": "cut"},
        {"train_folder": "x", "type": "streaming", "tokenizer_path": "t", "packing": "cut"},
        {"blend": [{"path": "x", "weight": 1, "image_folder": "y"}]},
        {"valid_folder": {"a": {"path": "x", "image_folder": "y"}}, "valid_every": 2},
    ],
)
def test_accepted(changes: dict[str, Any]) -> None:
    assert texts_of(changes) == []


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model_type": "LLAMA2", "model.vit_cfg": None}, "needs model_type = 'LLAVA', and it is 'LLAMA2'"),
        ({"image_size": None}, "data.is_multimodal = True needs data.image_size"),
        ({"model.image_token_id": 0}, "model.image_token_id = 0 must be at least 1"),
        ({"image_size": 30}, "data.image_size = 30 must be a multiple of data.patch_size = 14"),
        ({"image_size": 56}, "data.seq_len = 16 has no room for a picture, which is 16 tokens"),
        ({"model.vit_cfg": {"config": {"image_size": 56, "patch_size": 14}}}, "data.image_size = 28 differs from 56"),
        ({"type": "mocked", "train_folder": "x"}, "recorded batches have no pictures"),
        ({"train_folder": "x", "packing": "cut"}, "would cut pictures in tokenized files; set data.packing = 'best"),
        (
            {"type": "streaming", "tokenizer_path": "t", "packing": "pack_sample_into_one",
             "blend": [{"path": "x", "weight": 1, "type": "tokenized"}]},
            "set data.packing = 'best_fit' and data.document_mask = False",
        ),
        ({"train_folder": "x", "fim": {"rate": 1, "prefix": 1, "middle": 2, "suffix": 3, "bos": None, "eos": None}},
         "data.fim would move the text of a picture"),
        ({"image_folder": "s3://a/b"}, "pictures are read from a folder on a disk"),
        ({"blend": [{"path": "x", "weight": 1, "image_folder": "s3://y"}]}, "data.blend[0].image_folder = 's3://y'"),
        (
            {"is_multimodal": False, "valid_folder": {"a": {"path": "x", "image_folder": "y"}}},
            "data.valid_folder['a'].image_folder needs data.is_multimodal = True",
        ),
    ],
)  # fmt: skip
def test_refused(changes: dict[str, Any], text: str) -> None:
    assert any(text in found for found in texts_of(changes)), texts_of(changes)


def test_packing_does_not_cut_pictures_by_default() -> None:
    assert small_config(LLAVA).data.packing == "best_fit"
    assert small_config(LLAVA | {"data.use_packed_dataset": False}).data.packing == "unpacked"
    assert small_config({}).data.packing == "cut"


def test_a_class_token_is_one_more() -> None:
    assert tokens_per_image(small_config(LLAVA)) == 4
    tower = {"mm_vision_tower": "tower", "mm_vision_select_feature": "cls_patch"}
    assert tokens_per_image(small_config(LLAVA | {"model.vit_cfg": tower})) == 5
