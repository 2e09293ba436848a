"""CUDA graphs on a GPU: the numbers are those without graphs, and each layer is one graph a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from helpers.graphed_steps import NUM_MICRO_BATCHES, STEPS, packed, rows, train
from helpers.tiny import tiny_engine, tiny_model
from torch._dynamo.utils import counters

from internlm.core.compilation.compile_layers import compile_layers
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.engine import Engine
from internlm.data.batch import Batch
from internlm.solver.grad_scaler import ConstantGradScaler
from internlm.solver.optimizer.rules.adamw import AdamW

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LAYERS = 2
SCALE = 16

# Of the norm of what is compared. The same kernels compute the same numbers, but for what cuBLAS chooses and the order
# of atomic additions: some ten roundings of bf16, a few hundred of fp32. What is stale is wrong in the first digit.
TOLERANCES = {"torch.bfloat16": 2e-2, "torch.float32": 2e-5}


@pytest.fixture(autouse=True)
def _default_mode() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def new_engine(dtype: str, changes: dict[str, Any], cuda_graphs: bool) -> Engine:
    torch._dynamo.reset()
    device = torch.device("cuda", 0)
    context = ParallelContext.create(device=device)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_layers": LAYERS}
    model = compile_layers(tiny_model(context, dtype=dtype, **shape, **changes), cuda_graphs=cuda_graphs)
    # With so large an epsilon an update is in proportion to its gradient: AdamW would make noise of small ones.
    return tiny_engine(context, ConstantGradScaler(device), model, clip_grad_norm=0.5, rule=AdamW(eps=1.0))


@pytest.mark.parametrize(
    ("dtype", "batches", "changes"),
    [
        ("torch.bfloat16", packed, {}),
        ("torch.bfloat16", rows, {}),
        ("torch.float32", packed, {"checkpoint": 1.0}),
    ],
)
def test_graphs(
    dtype: str, batches: Callable[..., Batch], changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = partial(batches, scale=SCALE)
    expected = train(new_engine(dtype, changes, False), batch, lr=1.0)
    counters.clear()
    engine = new_engine(dtype, changes, True)
    found = train(engine, batch, lr=1.0)
    for own, wanted in zip(found, expected, strict=True):
        for one, other in zip(own, wanted, strict=True):
            assert (one - other).norm() <= TOLERANCES[dtype] * other.norm()

    assert counters["inductor"]["cudagraph_skips"] == 0
    replays: list[torch.cuda.CUDAGraph] = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(graph), replay(graph))[1])
    following = batch(STEPS)
    torch.cuda.set_sync_debug_mode("error")
    engine.train_step(following, 1.0)
    torch.cuda.set_sync_debug_mode("default")
    assert len(replays) == 2 * LAYERS * NUM_MICRO_BATCHES
    assert len(set(map(id, replays))) >= 2 * LAYERS
