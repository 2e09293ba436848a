"""The optimizer against torch.optim.AdamW on the unsharded model, on one and several ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.ranks import RankPool
from helpers.tiny import global_batch, tiny_engine, tiny_model
from torch import Tensor, nn
from torch.nn import functional as F

from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.shard_spec import ShardSpec, attach_shard_spec
from internlm.model.ops.attention.causal_attention import VarlenMetadata
from internlm.solver.grad_scaler import DynamicGradScaler
from internlm.solver.optimizer.bucket_groups import BucketGroups, BucketKind
from internlm.solver.optimizer.flat_bucket import FlatBucket
from internlm.solver.optimizer.hybrid_zero import HybridZeroOptimizer
from internlm.solver.optimizer.parameter_groups import GroupOptions, ParameterGroup, freeze_parameters

LR, DECAY, STEPS = 3e-3, 0.1, 20
EPSILON = torch.finfo(torch.float32).eps


def oracle(
    model: nn.Module, steps: int, clip: float, size: int = 4
) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Plain PyTorch on the whole global batch: losses, gradient norms, weights after `steps`."""
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decay, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), fused=True)
    losses, norms = [], []
    for step in range(steps):
        optimizer.zero_grad()
        batch = global_batch(step, size)
        valid = max(batch.num_valid_tokens, 1)
        total = 0.0
        for micro in batch.micro_batches:
            hidden = model(micro.input_ids, micro.position_ids, VarlenMetadata.of(micro.lengths))  # type: ignore[arg-type]
            loss = F.cross_entropy(model.logits(hidden)[0], micro.labels[0], reduction="sum") / valid  # type: ignore[operator]
            loss.backward()
            total += loss.item()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip if clip > 0 else torch.inf)))
        optimizer.step()
        losses.append(total)
    return losses, norms, {name: p.detach().clone() for name, p in model.named_parameters()}


def ours(
    steps: int, zero: int = -1, size: int = 4, **optimizer: Any
) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """The engine on this process's share of the same global batches."""
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    context = ParallelContext.create(ParallelLayout(world_size=world, zero=zero))
    engine = tiny_engine(context, weight_decay=DECAY, **optimizer)
    losses, norms = [], []
    for step in range(steps):
        result = engine.train_step(global_batch(step, size, context.rank, world), LR)
        losses.append(float(result.loss))
        norms.append(float(result.grad_norm))
    engine.optimizer.finish_gathering()
    weights = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    context.close()
    return losses, norms, weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_update_of_one_process_is_bit_equal_to_torch_adamw(dtype: torch.dtype) -> None:
    """Given the same gradients, 20 updates equal torch.optim.AdamW on the separate tensors bit for bit."""
    context = ParallelContext.create()
    engine = tiny_engine(context, model=tiny_model(context, dtype=str(dtype)), weight_decay=DECAY)
    reference = copy.deepcopy(tiny_model(context, dtype=str(dtype)))
    parameters = dict(reference.named_parameters())
    groups = [
        {"params": [p for p in parameters.values() if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in parameters.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8, fused=True)
    optimizer = engine.optimizer
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        optimizer.begin_step(1)
        total = torch.zeros(())
        for name, parameter in engine.model.named_parameters():
            gradient = torch.randn(parameter.shape, generator=generator, dtype=dtype)
            parameters[name].grad = gradient.clone()
            total = total + (parameter * gradient).sum()
        total.backward()
        optimizer.step(LR)
        adamw.step()
    for name, parameter in engine.model.named_parameters():
        assert torch.equal(parameter, parameters[name]), name


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_training_equals_plain_pytorch(clip: float) -> None:
    """Losses, norms and weights of 20 steps with ragged masks and a wholly masked micro batch."""
    losses, norms, weights = ours(STEPS, clip_grad_norm=clip)
    expected = oracle(tiny_model(ParallelContext.create()), STEPS, clip)
    check(losses, norms, weights, expected, STEPS)


def check(losses: list[float], norms: list[float], weights: dict[str, Tensor], expected: Any, steps: int) -> None:
    # The sums run in another order: a few roundings in the loss. AdamW moves a weight by up to lr a step whatever the
    # size of its gradient, so the rounding of a gradient near zero shows as a share of lr; 1 % of the way is allowed.
    torch.testing.assert_close(losses, expected[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(norms, expected[1], rtol=1e-4, atol=0)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[2][name], rtol=0, atol=0.01 * LR * steps, msg=name)


@pytest.mark.parametrize(("world", "zero"), [(2, -1), (2, 1), (4, -1), (4, 2), (4, 1)])
@pytest.mark.parametrize("overlap", [False, True])
def test_data_parallel_equals_plain_pytorch(
    ranks: Callable[[int], RankPool], world: int, zero: int, overlap: bool
) -> None:
    """Every zero size gives the losses, norms and weights of one plain process, on every rank."""
    expected = oracle(tiny_model(ParallelContext.create()), 6, 0.5)
    for losses, norms, weights in ranks(world).run(run_overlapping, 6, zero, overlap):
        check(losses, norms, weights, expected, 6)


def run_overlapping(steps: int, zero: int, overlap: bool) -> Any:
    return ours(
        steps,
        zero,
        clip_grad_norm=0.5,
        overlap_sync_grad=overlap,
        overlap_sync_param=overlap,
        reduce_bucket_size=3000,
    )


def test_two_ranks_agree_bit_for_bit(ranks: Callable[[int], RankPool]) -> None:
    """After sharded updates and gathers, both ranks hold the same bits."""
    (first, second) = ranks(2).run(run_overlapping, 4, -1, True)
    assert first[0] == second[0]
    assert all(torch.equal(first[2][name], second[2][name]) for name in first[2])


def test_gradients_may_travel_in_bf16(ranks: Callable[[int], RankPool]) -> None:
    """bf16 gradients have 8 bits: the norm is within 2**-8 of the exact one on the first step."""
    exact = ours(1)[1][0]
    for _, norms, _ in ranks(2).run(run_bf16_reduction):
        assert norms[0] != exact
        assert abs(norms[0] - exact) <= 2**-8 * exact


def run_bf16_reduction() -> Any:
    return ours(1, reduce_dtype=torch.bfloat16)


def test_an_overflow_skips_the_update_and_lowers_the_scale() -> None:
    context = ParallelContext.create()
    scaler = DynamicGradScaler(
        initial_scale=2.0**60,
        min_scale=1.0,
        max_scale=2.0**61,
        growth_factor=2.0,
        backoff_factor=2.0**-50,
        growth_interval=100,
        hysteresis=1,
    )
    engine = tiny_engine(context, scaler, weight_decay=DECAY)
    with torch.no_grad():
        # A weight that makes the scaled gradient overflow fp32.
        engine.model.norm.weight.mul_(1e25)  # type: ignore[union-attr,operator]
    before = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    result = engine.train_step(global_batch(0), LR)
    assert float(result.skipped) == 1.0
    assert all(torch.equal(p, before[name]) for name, p in engine.model.named_parameters())
    assert engine.optimizer.num_updates == 0  # type: ignore[attr-defined]
    assert float(scaler.scale) == 2.0**10


def test_the_loss_scale_leaves_no_trace() -> None:
    """A power-of-two scale changes no bit of norm, loss and weights."""
    scaler = DynamicGradScaler(
        initial_scale=1024.0,
        min_scale=1.0,
        max_scale=2.0**20,
        growth_factor=2.0,
        backoff_factor=0.5,
        growth_interval=2,
        hysteresis=2,
    )
    plain = ours(5, clip_grad_norm=0.5)
    scaled = ours(5, clip_grad_norm=0.5, scaler=scaler)
    assert plain[0] == scaled[0]
    assert plain[1] == scaled[1]
    assert all(torch.equal(plain[2][name], scaled[2][name]) for name in plain[2])


def test_an_unknown_hyper_parameter_is_named() -> None:
    engine = tiny_engine(ParallelContext.create())
    with pytest.raises(
        ValueError, match=r"unknown hyper-parameters \['beta3'\]: the update rule has \['beta1', 'beta2', 'eps', 'lr'\]"
    ):
        engine.train_step(global_batch(0), {"lr": 1e-3, "beta3": 0.9})


def test_a_second_update_in_one_step_is_refused() -> None:
    engine = tiny_engine(ParallelContext.create())
    engine.train_step(global_batch(0), LR)
    with pytest.raises(RuntimeError, match="the update of this step was already made"):
        engine.optimizer.step(LR)  # type: ignore[arg-type]
    engine.train_step(global_batch(1), LR)


def test_a_frozen_group_that_nobody_froze_is_refused() -> None:
    context = ParallelContext.create()
    model, groups = tiny_model(context), [ParameterGroup("tok_embeddings.*", freeze=True)]
    with pytest.raises(ValueError, match=r"'tok_embeddings.weight' requires a gradient.*call freeze_parameters first"):
        HybridZeroOptimizer(model, context, groups=groups)
    freeze_parameters([model], groups)
    HybridZeroOptimizer(model, context, groups=groups)


def test_a_batch_without_valid_tokens_changes_nothing_but_decay() -> None:
    context = ParallelContext.create()
    engine = tiny_engine(context, weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    batch = global_batch(0)
    batch.micro_batches = [batch.micro_batches[3]]
    assert batch.num_valid_tokens == 0
    result = engine.train_step(batch, LR)
    assert float(result.loss) == 0.0
    assert float(result.grad_norm) == 0.0
    assert all(torch.equal(p, before[name]) for name, p in engine.model.named_parameters())


def test_the_norm_of_millions_of_elements_is_exact_to_fp32() -> None:
    """A plain fp32 sum of 8 million squares is off by 1e-4; the norm must not depend on how state is sharded."""
    parameter = nn.Parameter(torch.zeros(2048, 4096))
    attach_shard_spec(parameter, ShardSpec.whole("weight", parameter.shape))
    kind = BucketKind(torch.float32, GroupOptions(0.1), "weight", "data", (), ())
    bucket = FlatBucket([parameter], kind, BucketGroups(None, None))
    bucket.grad_shard.copy_(torch.randn(bucket.grad_shard.shape, generator=torch.Generator().manual_seed(0)))
    expected = bucket.grad_shard.double().square().sum()
    # One rounding a square and ten a row sum, of either sign: well within 2**-20.
    torch.testing.assert_close(bucket.squared_grad_norm(), expected, rtol=2**-20, atol=0)
