"""Float8 layers inside of compiled layers: one graph, and the same bits."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from helpers.tiny import global_batch, tiny_config, tiny_engine
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from internlm.core.compilation.compile_layers import compile_layers
from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.fsdp import apply_fsdp, local_tensor, reshard
from internlm.core.parallel.linear.weight_gathering import GatherPlan
from internlm.core.parallel.model_parallel import ParallelOptions, parallel_of
from internlm.core.parallel.parallelize import parallelize
from internlm.model.ops.float8 import kernels
from internlm.model.registry import build_model


def train(
    layout: ParallelLayout, options: dict[str, Any], compiled: bool, fsdp: bool
) -> tuple[list[float], list[Tensor]]:
    """Losses of two steps, and this rank's weights after them."""
    torch._dynamo.reset()
    context = ParallelContext.create(layout)
    config = tiny_config(hidden_size=64, num_layers=3, intermediate_size=96, dtype="torch.bfloat16")
    with torch.device("meta"):
        model = build_model("INTERNLM2", config)
    parallelize(model, context, seed=7, options=ParallelOptions(float8_layers=range(1, 3), **options))
    if compiled:
        # Traces everything as for a device, and runs PyTorch's own operations: the bits must be the same.
        compile_layers(model, backend="aot_eager")
    if fsdp:
        apply_fsdp(model, context, float8_scales=parallel_of(model).weight_scales)
    engine = tiny_engine(context, model=model, clip_grad_norm=0.5, reduce_bucket_size=3000)
    index, size = context.index("data"), context.size("data")
    losses = [float(engine.train_step(global_batch(step, 4, index, size), 1e-2).loss) for step in range(2)]
    reshard(model)
    weights = [local_tensor(parameter).clone() for parameter in model.parameters()]
    context.close()
    return losses, weights


def assert_equal(found: tuple[list[float], list[Tensor]], expected: tuple[list[float], list[Tensor]]) -> None:
    assert found[0] == expected[0]
    assert all(torch.equal(one, other) for one, other in zip(found[1], expected[1], strict=True))


def test_a_layer_with_float8_is_one_graph() -> None:
    """compile_layers asks for whole graphs where nothing is exchanged, and dynamo refuses what breaks them."""
    plain, compiled = (train(ParallelLayout(), {}, on, False) for on in (False, True))
    assert_equal(compiled, plain)


@pytest.mark.parametrize(
    ("layout", "options", "fsdp"),
    [
        (ParallelLayout(world_size=2), {}, True),
        (ParallelLayout(world_size=2, tensor=2, mode="fsp"), {}, False),
        (ParallelLayout(world_size=2, weight=2, mode="isp"), {"weight_gathering": GatherPlan(overlap=True)}, False),
    ],
    ids=["FSDP that gathers float8", "fsp", "isp"],
)
def test_compiled_layers_give_the_same_bits(
    layout: ParallelLayout, options: dict[str, Any], fsdp: bool, ranks: Any
) -> None:
    plain, compiled = (ranks(2).run(train, layout, options, on, fsdp) for on in (False, True))
    for found, expected in zip(compiled, plain, strict=True):
        assert_equal(found, expected)


def test_casts_can_be_compiled_where_layers_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    kernels._compiled_casts.cache_clear()
    options = {"postpone_weight_gradients": True}
    plain, compiled = (train(ParallelLayout(), {**options, "compile_casts": on}, False, False) for on in (False, True))
    assert_equal(compiled, plain)
    # One for the maximum of each number and rank of tensors, one for rounding tensors of each rank and format.
    assert 2 <= counter.frame_count <= 8
    kernels._compiled_casts.cache_clear()
