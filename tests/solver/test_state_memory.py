"""What the optimizer allocates, until the end of a step, is what the form says, and scratch for one part."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.memory import PeakMemory
from torch import nn

import internlm.solver.optimizer.bucket as bucket
import internlm.solver.optimizer.shard_updaters as updates
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.parameter_events import deliver_gradient
from internlm.core.parallel.shard_spec import ShardSpec, attach_shard_spec
from internlm.solver.optimizer.bucket import ALIGNMENT, NORM_ROW
from internlm.solver.optimizer.hybrid_zero import HybridZeroOptimizer
from internlm.solver.optimizer.state_form import StateForm
from internlm.solver.optimizer.stochastic_rounding import NUM_STARTS

PART = 2**16
SHAPES = [(640, 1024)] * 12 + [(1024,)] * 4
BF16 = torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize(
    ("gradients", "moments", "is_offloaded"),
    list(itertools.product((torch.float32, BF16), (torch.float32, BF16), (False, True))),
)
def test_nothing_exists_twice(
    monkeypatch: pytest.MonkeyPatch,
    gradients: torch.dtype,
    moments: torch.dtype,
    is_offloaded: bool,
    dtype: torch.dtype,
) -> None:
    for module in (bucket, updates):
        monkeypatch.setattr(module, "part_size", lambda device: PART)
    form = StateForm(gradients, moments, is_offloaded)
    weights = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES]
    for number, weight in enumerate(weights):
        attach_shard_spec(weight, ShardSpec.whole(f"w{number}", weight.shape))
    numel = sum(weight.numel() for weight in weights)
    model = nn.ParameterList(weights)
    bucket_size = 2 * 640 * 1024
    largest = max(weight.numel() for weight in weights) * dtype.itemsize
    with PeakMemory() as memory:
        optimizer = HybridZeroOptimizer(
            model, ParallelContext.create(), clip_grad_norm=1.0, reduce_bucket_size=bucket_size, form=form
        )
        for _ in range(2):
            optimizer.begin_step(2)
            for _ in range(2):
                for weight in reversed(weights):
                    deliver_gradient(weight, torch.ones(weight.shape, dtype=dtype))
            optimizer.step(1e-3)
    # The weights that were there before the optimizer are given up for views of its buffers.
    state = numel * (dtype.itemsize + form.gradient_dtype(dtype).itemsize + 2 * moments.itemsize)
    state += 4 * numel if form.has_master(dtype) else 0
    padding = len(optimizer.buckets) * NORM_ROW + len(weights) * ALIGNMENT
    # Two moments, a gradient and random numbers of one part, in 4 bytes each; two parts on their way in each direction.
    scratch = (4 + 4 * is_offloaded) * 4 * PART
    tables = 0 if moments == torch.float32 else 2 * (8 * 4 + 4) * (NUM_STARTS + 1024)
    norms = 3 * 8 * (numel + padding) // NORM_ROW
    allowed = state + 16 * padding + scratch + tables + norms + largest
    assert state <= memory.peak <= allowed
    # The slack hides no second copy of a kind of buffer, of which the smallest has 2 bytes an element.
    assert allowed - state < 2 * numel
