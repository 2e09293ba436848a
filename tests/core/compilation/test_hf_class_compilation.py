"""Compiled layers of transformers compute what eager ones do, for documents of any lengths."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.hf_classes import VOCAB
from helpers.hf_runs import hf_model_config
from torch import Tensor, nn

from internlm.core.compilation.compile_layers import compile_layers
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.parallelize import parallelize
from internlm.model.ops.attention.causal_attention import VarlenMetadata
from internlm.model.registry import build_model

pytest.importorskip("transformers")


def loss_and_gradients(model: nn.Module, lengths: tuple[int, ...]) -> list[Tensor]:
    ids = torch.randint(3, VOCAB, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    model.zero_grad()
    loss = model(ids, positions, VarlenMetadata.of(lengths)).square().sum()
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


@pytest.mark.parametrize("policy", ["everything", "nothing"])
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "mixtral"])
def test_compiled_layers_compute_what_eager_ones_do(family: str, policy: str, tmp_path: Path) -> None:
    config = hf_model_config(family, tmp_path)
    with torch.device("meta"):
        models = [build_model("hf", config) for _ in range(2)]
    eager, compiled = (parallelize(model, ParallelContext.create()) for model in models)
    for model in (eager, compiled):
        for layer in model.numbered_layers().values():
            layer.save_policy = policy
    compile_layers(compiled, backend="aot_eager")
    for lengths in ((11, 14, 7), (20, 12), (32,)):
        found, expected = loss_and_gradients(compiled, lengths), loss_and_gradients(eager, lengths)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
