"""A config's `data.type` decides how its folders are read, for training, evaluation and the checks before them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.configs import small_config

from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.data.megatron_files.writer import MegatronWriter
from internlm.initialize.build_data import build_loader, build_valid_sets
from internlm.initialize.data_checks import check_data
from internlm.initialize.tokenizers import data_tokenizer

DOCUMENTS = [np.arange(1, length) for length in range(5, 60)]


def write_megatron(folder: Path) -> dict[str, Any]:
    with MegatronWriter(folder / "a.bin", np.dtype(np.uint16)) as writer:
        for document in DOCUMENTS:
            writer.write(document.tolist())
    return {"data.type": "megatron"}


def write_npy(folder: Path) -> dict[str, Any]:
    np.save(folder / "a.npy", np.concatenate([np.append(document, 0) for document in DOCUMENTS]).astype(np.uint16))
    return {"data.type": "arrays", "data.array_separator": 0}


def write_raw(folder: Path) -> dict[str, Any]:
    ids = np.concatenate([np.append(document, 0) for document in DOCUMENTS]).astype("<u2")
    (folder / "a.bin").write_bytes(ids.tobytes())
    return {"data.type": "arrays", "data.array_separator": 0, "data.array_dtype": "uint16"}


@pytest.mark.parametrize("write", [write_megatron, write_npy, write_raw])
def test_every_format_is_read(write: Any, tmp_path: Path) -> None:
    for name in ("train/en", "valid/set"):
        (tmp_path / name).mkdir(parents=True)
        keys = write(tmp_path / name)
    folders = {"train_folder": str(tmp_path / "train"), "valid_folder": str(tmp_path / "valid"), "valid_every": 1}
    config = small_config({**keys, **{f"data.{key}": value for key, value in folders.items()}})
    context = ParallelContext(ParallelLayout(), 0, torch.device("cpu"))
    separators = 0 if keys["data.type"] == "megatron" else 1
    # The second time with what the first one has cached beside the files.
    for _ in range(2):
        train, valid = check_data(config, context)
        assert f"{len(DOCUMENTS)} documents" in train and f"{len(DOCUMENTS)} documents" in valid
        assert data_tokenizer(config) is None
        loader = build_loader(config, context)
        assert next(loader).num_valid_tokens > 0 and loader.type_names == ["en"]
        loader.close()
        sets = build_valid_sets(config, context)
        expected = sum(len(document) - 1 + separators for document in DOCUMENTS)
        assert {name: sum(b.num_valid_tokens for b in each) for name, each in sets.items()} == {"set": expected}
