"""Checkpoints of tiny models, written without a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from helpers.model import TINY, tiny_model
from internlm.checkpoint.tensor_files import write_weights
from internlm.checkpoint.weight_source import LazyTensor
from internlm.config.schema import Config
from internlm.utils.storage import StoragePath, storage_path


def save(folder: Path, model_type: str, **keys: Any) -> tuple[Any, StoragePath]:
    """A checkpoint with a tiny model of random weights; returns both."""
    model = tiny_model(model_type, **keys)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model, write(folder, model, model_type, **keys)


def write(
    folder: Path | StoragePath, model: torch.nn.Module, model_type: str, data: Any = None, **keys: Any
) -> StoragePath:
    config = Config.model_validate(
        {
            "model_type": model_type,
            "model": {**TINY, **keys},
            "data": {"seq_len": 8, "micro_bsz": 1, "total_steps": 1, **(data or {})},
        }
    )
    tensors = {
        name: LazyTensor(tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)  # type: ignore[misc]
        for name, tensor in model.state_dict().items()
    }
    return write_weights(storage_path(folder), tensors, config=config)
