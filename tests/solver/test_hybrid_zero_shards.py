"""Sums, norm, update and pieces follow from ShardSpecs alone: hand-made shards against AdamW on whole tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.ranks import RankPool
from helpers.sharded import (
    CLIP,
    DECAY,
    GLOBAL_SHAPES,
    LAYOUTS,
    LR,
    WEIGHT_TOLERANCE,
    ShardedModel,
    assemble,
    assert_trained_as_whole,
    new_optimizer,
    normal,
    train_shards,
)
from torch import nn

from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.parameter_events import deliver_gradient
from internlm.core.parallel.shard_spec import ShardSpec, attach_shard_spec
from internlm.solver.optimizer.bucket import NORM_ROW
from internlm.solver.optimizer.hybrid_zero import HybridZeroOptimizer
from internlm.solver.optimizer.parameter_groups import GroupOptions
from internlm.solver.optimizer.state_form import FP32_STATE, StateForm


def train(name: str, dtype: torch.dtype = torch.float32, bucket_size: int = 40) -> dict[str, Any]:
    """Three steps of two backward passes each on this rank's shards."""
    model = ShardedModel(ParallelContext.create(LAYOUTS[name]), dtype)
    return train_shards(model, new_optimizer(model, bucket_size))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_takes_the_same_steps(ranks: Callable[[int], RankPool], name: str) -> None:
    assert_trained_as_whole(ranks(LAYOUTS[name].world_size).run(train, name))


def test_masters_of_bf16_shards_are_the_whole_ones(ranks: Callable[[int], RankPool]) -> None:
    """bf16 parameters with fp32 gradients: all layouts have the same masters, and the weights are their rounding."""
    reference = None
    for name in ("tensor x data", "isp", "pipeline x tensor"):
        results = ranks(4).run(train, name, torch.bfloat16)
        state = assemble(result["state"] for result in results)
        weights = assemble(result["weights"] for result in results)
        masters = {n: state[f"master/{n}"] for n in GLOBAL_SHAPES}
        assert all(torch.equal(weights[n], masters[n].bfloat16().float()) for n in masters)
        reference = reference or masters
        torch.testing.assert_close(masters, reference, rtol=0, atol=WEIGHT_TOLERANCE)


def small_optimizer(num_chunks: int = 1) -> tuple[list[nn.Parameter], HybridZeroOptimizer]:
    weights = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    for number, weight in enumerate(weights):
        attach_shard_spec(weight, ShardSpec.whole(f"w{number}", weight.shape))
    chunks = [nn.Module() for _ in range(num_chunks)]
    for chunk in chunks:
        chunk.register_parameter("shared", weights[0])
    chunks[0].register_parameter("own", weights[1])
    return weights, HybridZeroOptimizer(chunks, ParallelContext.create(), reduce_bucket_size=1)


def test_a_weight_in_two_chunks_waits_for_the_gradients_of_both() -> None:
    (shared, own), optimizer = small_optimizer(num_chunks=2)
    optimizer.begin_step(2)
    for _ in range(4):
        deliver_gradient(shared, torch.ones(3))
    for _ in range(2):
        deliver_gradient(own, torch.ones(3))
    assert float(optimizer.step(LR).grad_norm) == pytest.approx((3 * 16 + 3 * 4) ** 0.5)


def test_a_gradient_after_the_reduction_is_an_error_that_names_the_parameter() -> None:
    (first, second), optimizer = small_optimizer()
    optimizer.begin_step(1)
    deliver_gradient(second, torch.ones(3))
    deliver_gradient(first, torch.ones(3))
    with pytest.raises(RuntimeError, match='a gradient of "w0" arrived after its reduction had started'):
        deliver_gradient(first, torch.ones(3))


def test_a_parameter_that_never_had_a_gradient_is_not_decayed() -> None:
    """But once it had one, a step without is a step with a zero gradient."""
    (used, unused), optimizer = small_optimizer()
    for state in optimizer.states:
        state.bucket.kind = replace(state.bucket.kind, options=GroupOptions(0.5))
    for _ in range(2):
        optimizer.begin_step(1)
        deliver_gradient(used, torch.ones(3))
        optimizer.step(LR)
    assert torch.equal(unused, torch.ones(3))
    optimizer.begin_step(1)
    deliver_gradient(unused, torch.ones(3))
    optimizer.step(LR)
    after = unused.detach().clone()
    optimizer.begin_step(1)
    optimizer.step(LR)
    assert (unused < after * (1 - 0.5 * LR)).all()


def test_a_loaded_state_shows_what_was_trained_before() -> None:
    """A parameter without a gradient since a resume goes on being decayed, if it had one before."""
    (first, second), optimizer = small_optimizer()
    for state in optimizer.states:
        state.bucket.kind = replace(state.bucket.kind, options=GroupOptions(0.5))
    for key, _, pieces in optimizer.sharded_state():
        if key == "exp_avg_sq/w0":
            for _, piece in pieces:
                piece.fill_(1e-3)
    optimizer.num_updates = 1
    optimizer.begin_step(1)
    optimizer.step(LR)
    torch.testing.assert_close(first.detach(), torch.full((3,), 1 - 0.5 * LR))
    assert torch.equal(second, torch.ones(3))


BF16 = torch.bfloat16
FULL = {
    "fp32": (torch.float32, FP32_STATE),
    "bf16": (BF16, FP32_STATE),
    "bf16 moments": (torch.float32, StateForm(moments=BF16)),
    "all in bf16": (BF16, StateForm(BF16, BF16)),
    "offloaded": (BF16, StateForm(is_offloaded=True)),
    "offloaded, all in bf16": (BF16, StateForm(BF16, BF16, is_offloaded=True)),
}


def train_full_shards(name: str) -> tuple[list[float], torch.Tensor, torch.Tensor]:
    """Norms, weights and own masters after two clipped steps of a weight that fills the shard of every rank."""
    dtype, form = FULL[name]
    context = ParallelContext.create(ParallelLayout(world_size=torch.distributed.get_world_size()))
    weight = nn.Parameter(normal("full", (context.world_size * NORM_ROW,)).to(dtype))
    attach_shard_spec(weight, ShardSpec.whole("full", weight.shape))
    model = nn.Module()
    model.register_parameter("full", weight)
    optimizer = HybridZeroOptimizer(model, context, weight_decay=DECAY, clip_grad_norm=CLIP, form=form)
    (bucket,) = optimizer.buckets
    assert (bucket.range_in_shard(0), bucket.numel) == (slice(0, NORM_ROW), weight.numel())
    norms = []
    for step in range(2):
        optimizer.begin_step(1)
        deliver_gradient(weight, normal(f"full/{step}", tuple(weight.shape)).to(dtype) / context.world_size)
        norms.append(float(optimizer.step(LR).grad_norm))
    context.close()
    return norms, weight.detach(), bucket.master.detach().clone()


@pytest.mark.parametrize("name", FULL)
def test_a_shard_without_padding_is_updated_to_its_last_element(ranks: Callable[[int], RankPool], name: str) -> None:
    dtype, form = FULL[name]
    weight = nn.Parameter(normal("full", (2 * NORM_ROW,)).to(dtype).float())
    adamw = torch.optim.AdamW([weight], lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    expected = []
    for step in range(2):
        weight.grad = normal(f"full/{step}", (2 * NORM_ROW,)).to(dtype).float()
        expected.append(float(nn.utils.clip_grad_norm_([weight], CLIP)))
        adamw.step()
    # Moments that are rounded to 8 bits after the first step change the second one by 1 % or so of the learning rate.
    tolerance = WEIGHT_TOLERANCE if form.moments == torch.float32 else 0.03 * LR
    for (norms, found, master), whole in zip(ranks(2).run(train_full_shards, name), weight.chunk(2), strict=True):
        assert norms == pytest.approx(expected, rel=1e-6)
        torch.testing.assert_close(master, whole.detach(), rtol=0, atol=tolerance)
        torch.testing.assert_close(found, weight.detach().to(dtype), rtol=2**-7 if dtype == BF16 else 0, atol=tolerance)
        assert any(torch.equal(part, master.to(dtype)) for part in found.chunk(2))
