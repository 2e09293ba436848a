"""A step sends what the formulas of doc/parallelism.md say, and nothing else.

With k ranks in the zero group and r replicas of it, P elements on a rank, gradients of g bytes and parameters of p
bytes: a reduce-scatter of g P bytes over k, an all-reduce of g P / k bytes over r, an all-gather of p P bytes over k.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.ranks import RankPool
from helpers.sharded import LAYOUTS, ShardedModel
from helpers.tiny import global_batch, tiny_model
from helpers.traffic import Traffic

from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.fsdp import apply_fsdp
from internlm.core.parallel.layers import layers_of
from internlm.model.ops.attention.causal_attention import VarlenMetadata
from internlm.model.ops.cross_entropy import linear_cross_entropy
from internlm.solver.optimizer.hybrid_zero import HybridZeroOptimizer
from internlm.solver.optimizer.state_form import FP32_STATE, StateForm

NORM = 8
"""Bytes of the all-reduce of the gradient norm over the world: one fp64 number."""


def zero_step(
    layout: ParallelLayout, dtype: torch.dtype, reduce_dtype: torch.dtype, form: StateForm = FP32_STATE
) -> tuple[Any, Any]:
    """What the second step sent, and what it should have; the first also finds out which parameters are in use."""
    context = ParallelContext.create(layout)
    model = ShardedModel(context, dtype)
    optimizer = HybridZeroOptimizer(model, context, reduce_dtype=reduce_dtype, form=form)
    for step in range(2):
        with Traffic() as traffic:
            optimizer.begin_step(1)
            model.deliver(step)
            optimizer.step(1e-3)
    expected: Counter[tuple[str, int]] = Counter()
    for bucket in optimizer.buckets:
        view, kind = context.view(bucket.kind.view), bucket.kind
        k, r = view.size("zero"), view.size(f"{kind.data_axis}_replica")
        expected["reduce_scatter", k] += reduce_dtype.itemsize * bucket.numel
        expected["all_gather", k] += dtype.itemsize * bucket.numel
        for size in (r, *(view.size(axis) for axis in kind.partial_over)):
            expected["all_reduce", size] += reduce_dtype.itemsize * bucket.numel // k
    expected["all_reduce", layout.world_size] += NORM
    context.close()
    return traffic.num_bytes, Counter({key: value for key, value in expected.items() if key[1] > 1})


@pytest.mark.parametrize(
    "layout",
    [
        LAYOUTS["data"],
        LAYOUTS["zero x replicas"],
        ParallelLayout(world_size=4, zero=1),
        LAYOUTS["tensor x data"],
        LAYOUTS["zero x context"],
        LAYOUTS["isp"],
        LAYOUTS["isp x replicas"],
        LAYOUTS["isp x pipeline"],
    ],
    ids=["zero", "hybrid", "no zero", "tensor", "context", "isp", "isp no zero", "isp pipeline"],
)
@pytest.mark.parametrize(
    ("dtype", "reduce_dtype"), [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16,) * 2]
)
def test_zero_sends_the_least(
    ranks: Callable[[int], RankPool], layout: ParallelLayout, dtype: torch.dtype, reduce_dtype: torch.dtype
) -> None:
    for sent, expected in ranks(layout.world_size).run(zero_step, layout, dtype, reduce_dtype):
        assert sent == expected


@pytest.mark.parametrize("is_offloaded", [False, True])
def test_gradients_in_bf16_are_sent_as_they_are(ranks: Callable[[int], RankPool], is_offloaded: bool) -> None:
    """Whatever they would travel in otherwise, a copy in which would be larger than what bf16 saves."""
    form = StateForm(gradients=torch.bfloat16, is_offloaded=is_offloaded)
    sent, expected = zip(
        *ranks(4).run(zero_step, LAYOUTS["zero x replicas"], torch.bfloat16, torch.float32, form), strict=True
    )
    for one, other in zip(sent, expected, strict=True):
        sums = {key: size / 2 if key[0] == "reduce_scatter" else size for key, size in other.items()}
        sums["all_reduce", 2] /= 2
        assert one == sums


def fsdp_step(zero: int, num_micro_batches: int) -> tuple[Any, Any]:
    """Gathers: each layer before its forward and before its backward, all else once; sums after each backward."""
    world = torch.distributed.get_world_size()
    context = ParallelContext.create(ParallelLayout(world_size=world, zero=zero))
    model = apply_fsdp(tiny_model(context, dtype="torch.bfloat16"), context)
    k, r = context.size("zero", "weight"), context.size("data_replica", "weight")

    def padded_numel(module: torch.nn.Module) -> int:
        # Rows are dealt out evenly: each tensor is filled up to a multiple of k rows.
        return sum(-(-p.shape[0] // k) * k * math.prod(p.shape[1:]) for p in module.parameters())

    layers = sum(padded_numel(layer) for layer in layers_of(model))
    outer = padded_numel(model) - layers
    optimizer = HybridZeroOptimizer(model, context)
    for step in range(2):
        with Traffic() as traffic:
            optimizer.begin_step(num_micro_batches)
            for micro in global_batch(step, num_micro_batches).micro_batches:
                hidden = model(micro.input_ids, micro.position_ids, VarlenMetadata.of(micro.lengths))  # type: ignore[arg-type]
                linear_cross_entropy(hidden[0], model.head_weight(), micro.labels[0]).loss_sum.backward()  # type: ignore[operator]
            optimizer.step(1e-3)
    expected = Counter(
        {
            ("all_gather", k): num_micro_batches * 2 * (2 * layers + outer),
            ("reduce_scatter", k): num_micro_batches * 4 * (layers + outer),
            ("all_reduce", r): 4 * sum(bucket.numel for bucket in optimizer.buckets) if r > 1 else 0,
        }
    )
    expected["all_reduce", world] += NORM
    context.close()
    return traffic.num_bytes, +expected


@pytest.mark.parametrize(("world", "zero"), [(2, -1), (4, 2)])
def test_fsdp_sends_what_is_said(ranks: Callable[[int], RankPool], world: int, zero: int) -> None:
    for sent, expected in ranks(world).run(fsdp_step, zero, 2):
        assert sent == expected
