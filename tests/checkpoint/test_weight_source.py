"""Weights of another origin are finite, in the number format that they are trained in, too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.runs import new_trainer
from helpers.weights import InMemory

from internlm.checkpoint.run_state import load_weights
from internlm.checkpoint.weight_source import finite
from internlm.core.parallel.shard_spec import shard_spec_of
from internlm.utils.errors import CheckpointError


@pytest.mark.parametrize(
    ("dtype", "value", "message"),
    [
        (
            "torch.float16",
            -7e4,
            r"'norm\.weight' has values up to 7e\+04, above the largest float16, 6\.55e\+04: .*bf16 or fp32",
        ),
        ("torch.float32", float("nan"), r"'norm\.weight' has 1 of 32 values that are not finite"),
        ("torch.float32", float("inf"), r"'norm\.weight' has 1 of 32 values that are not finite"),
    ],
)
def test_training_does_not_start_from_values_that_are_not_finite(
    tmp_path: Path, dtype: str, value: float, message: str
) -> None:
    trainer = new_trainer(None, 1, dtype=dtype)
    weights = {
        shard_spec_of(parameter).name: parameter.detach().float().clone()
        for parameter in trainer.engine.chunks[0].parameters()
    }
    load_weights(trainer, InMemory(weights), "the source")
    weights["norm.weight"][3] = value
    with pytest.raises(CheckpointError, match="the source: " + message):
        load_weights(trainer, InMemory(weights), "the source")


def test_a_value_that_only_fp32_holds() -> None:
    with pytest.raises(CheckpointError, match="they would become inf; use fp32"):
        finite(torch.tensor([3.4e38]), "a", "the source", torch.bfloat16)
    assert finite(torch.tensor([6e4]), "a", "the source", torch.float16).dtype == torch.float16
