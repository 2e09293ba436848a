"""Checkpoints of models whose layers differ, with a parameter of three dimensions, load in any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.resume import save, tensors_of
from helpers.runs import Source
from helpers.tiny import tiny_engine
from helpers.unlike_layers import build_unlike_layers

from internlm.checkpoint.manager import CheckpointManager
from internlm.core.context.layout import ParallelLayout
from internlm.core.trainer import Trainer
from internlm.verify.record import TensorBox, join

LAYOUTS: dict[str, dict[str, Any]] = {
    "one process": {},
    "zero": {"world_size": 2},
    "mtp": {"world_size": 2, "tensor": 2, "mode": "mtp"},
    "isp": {"world_size": 2, "tensor": 2, "weight": 2, "mode": "isp"},
}


def trainer_of(layout: dict[str, Any], model_type: str, seed: int, folder: str) -> tuple[Trainer, CheckpointManager]:
    model, context = build_unlike_layers(ParallelLayout(**layout), model_type, seed=seed)
    manager = CheckpointManager(folder)
    engine = tiny_engine(context, model=model, reduce_bucket_size=3000)
    trainer = Trainer(
        engine, Source(context), total_steps=2, lr=lambda step: 1e-3, run_dir="unused", checkpointer=manager
    )
    return trainer, manager


def train_and_save(layout: dict[str, Any], model_type: str, folder: str) -> list[TensorBox]:
    trainer, manager = trainer_of(layout, model_type, 7, folder)
    trainer.fit()
    save(manager, trainer)
    tensors = tensors_of(trainer)
    trainer.context.close()
    return tensors


def tensors_after_load(layout: dict[str, Any], model_type: str, folder: str) -> list[TensorBox]:
    """Weights, masters and moments of a model with other initial weights that has loaded the checkpoint."""
    trainer, manager = trainer_of(layout, model_type, 8, folder)
    manager.load(trainer, f"{folder}/2")
    tensors = tensors_of(trainer)
    trainer.context.close()
    return tensors


@pytest.mark.parametrize("model_type", ["INTERNLM2", "LLAMA2"])
@pytest.mark.parametrize(
    ("saved", "loaded"), [("mtp", "isp"), ("isp", "one process"), ("zero", "mtp"), ("one process", "zero")]
)
def test_another_layout_loads_it(saved: str, loaded: str, model_type: str, ranks: Any, tmp_path: Path) -> None:
    found = [
        join(ranks(LAYOUTS[layout].get("world_size", 1)).run(run, LAYOUTS[layout], model_type, str(tmp_path)), "", {})
        for layout, run in ((saved, train_and_save), (loaded, tensors_after_load))
    ]
    before, after = found
    assert before.keys() == after.keys()
    assert any(tensor.shape == (2, 32, 32) for tensor in before.values())
    assert not [name for name, tensor in before.items() if not np.array_equal(tensor, after[name])]
