"""Sums, norm, update and pieces follow from ShardSpecs alone: hand-made shards against AdamW on whole tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.ranks import RankPool
from helpers.sharded import (
    BACKWARDS,
    CLIP,
    DECAY,
    GLOBAL_SHAPES,
    GRADIENT_TOLERANCE,
    LAYOUTS,
    LR,
    STEPS,
    WEIGHT_TOLERANCE,
    ShardedModel,
    assemble,
    model_pieces,
    padding_of,
    train_whole,
)
from torch import nn

from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.parameter_events import deliver_gradient
from internlm.core.parallel.shard_spec import ShardSpec, attach_shard_spec
from internlm.solver.optimizer.hybrid_zero import HybridZeroOptimizer


def train(name: str, dtype: torch.dtype = torch.float32, bucket_size: int = 40) -> dict[str, Any]:
    """Three steps of two backward passes each on this rank's shards."""
    context = ParallelContext.create(LAYOUTS[name])
    model = ShardedModel(context, dtype)
    optimizer = HybridZeroOptimizer(
        model, context, weight_decay=DECAY, clip_grad_norm=CLIP, reduce_bucket_size=bucket_size
    )
    norms, gradients = [], []
    for step in range(STEPS):
        optimizer.begin_step(BACKWARDS)
        for backward in range(BACKWARDS):
            # Gradients may be wider than the parameters.
            model.deliver(BACKWARDS * step + backward)
        norms.append(float(optimizer.step(LR).grad_norm))
        gradients.append([(n, [(b, p.clone()) for b, p in pieces]) for n, _, pieces in optimizer.sharded_gradients()])
    state = [(key, [(b, p.clone()) for b, p in pieces]) for key, _, pieces in optimizer.sharded_state()]
    context.close()
    return {
        "norms": norms,
        "gradients": gradients,
        "weights": model_pieces(model),
        "state": state,
        "padding": padding_of(model),
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_takes_the_same_steps(ranks: Callable[[int], RankPool], name: str) -> None:
    norms, gradients, weights = train_whole()
    results = ranks(LAYOUTS[name].world_size).run(train, name)
    for result in results:
        torch.testing.assert_close(result["norms"], norms, rtol=1e-6, atol=0)
        assert all((padding == 0).all() for padding in result["padding"])
    for step in range(STEPS):
        found = assemble(result["gradients"][step] for result in results)
        torch.testing.assert_close(found, gradients[step], rtol=0, atol=GRADIENT_TOLERANCE)
    found = assemble(result["weights"] for result in results)
    torch.testing.assert_close(found, weights, rtol=0, atol=WEIGHT_TOLERANCE)
    state = assemble(result["state"] for result in results)
    assert state.keys() == {f"{kind}/{name}" for kind in ("exp_avg", "exp_avg_sq") for name in GLOBAL_SHAPES}


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
    with pytest.raises(RuntimeError, match='a gradient of "w0" came after its reduction had begun'):
        deliver_gradient(first, torch.ones(3))


def test_a_parameter_that_never_had_a_gradient_is_not_decayed() -> None:
    """But once it had one, a step without is a step with a zero gradient."""
    (used, unused), optimizer = small_optimizer()
    for group in optimizer.adamw.param_groups:
        group["weight_decay"] = 0.5
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
