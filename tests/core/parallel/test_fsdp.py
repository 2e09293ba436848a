"""FSDP changes where weights lie, and no number: against one process, against torch's own FSDP2 loop, by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.ranks import RankPool
from helpers.runs import weights_of
from helpers.sharded import LAYOUTS, ShardedModel, assert_trained_as_whole, new_optimizer, train_shards
from helpers.tiny import global_batch, tiny_config, tiny_engine, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.fsdp import apply_fsdp, rows_of
from internlm.core.parallel.parallelize import parallelize
from internlm.core.parallel.shard_spec import Box, ShardSpec, attach_shard_spec, shard_spec_of
from internlm.model.ops.attention.causal_attention import VarlenMetadata
from internlm.model.registry import build_model
from internlm.solver.optimizer.fsdp_bucket import FsdpBucket
from internlm.solver.optimizer.hybrid_zero import HybridZeroOptimizer
from internlm.utils.errors import ConfigError

RATE = 3e-3


def context_of(zero: int = -1) -> ParallelContext:
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    return ParallelContext.create(ParallelLayout(world_size=world, zero=zero))


# -- whole runs -----------------------------------------------------------------------------------------------------


def run(zero: int, fsdp: bool, steps: int, changes: dict[str, Any]) -> dict[str, Any]:
    """Losses, norms, whole gradients of the last step, and whole weights."""
    context = context_of(zero)
    model = tiny_model(context, **changes)
    if fsdp:
        apply_fsdp(model, context)
        assert any(isinstance(parameter, DTensor) for parameter in model.parameters())
    engine = tiny_engine(context, model=model, weight_decay=0.1, clip_grad_norm=0.5, reduce_bucket_size=3000)
    optimizer = engine.optimizer
    assert isinstance(optimizer, HybridZeroOptimizer)
    results = [
        engine.train_step(global_batch(step, 8, context.rank, context.world_size), RATE) for step in range(steps)
    ]
    gradients = []
    for name, parameter, pieces in optimizer.sharded_gradients():
        copies = [(box, piece.clone()) for box, piece in pieces]
        gradients.append((name, shard_spec_of(parameter).global_shape, copies))
    weights = weights_of(model)
    context.close()
    return {
        "losses": [float(result.loss) for result in results],
        "norms": [float(result.grad_norm) for result in results],
        "gradients": gradients,
        "weights": weights,
    }


def whole_gradients(results: list[dict[str, Any]]) -> dict[str, Tensor]:
    """From the pieces of all ranks; NaN where a piece is missing."""
    wholes: dict[str, Tensor] = {}
    for result in results:
        for name, shape, pieces in result["gradients"]:
            whole = wholes.setdefault(name, torch.full(shape, torch.nan))
            for box, piece in pieces:
                whole[box.global_slices()] = piece
    return wholes


@pytest.mark.parametrize(("world", "zero"), [(2, -1), (4, -1), (4, 2)])
@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": True}, {"checkpoint": 1.0}, {"norm_head": True}, {"num_layers": 3, "vocab_size": 63}],
    ids=["plain", "tied", "checkpointed", "norm-head", "odd"],
)
def test_fsdp_equals_one_process(
    ranks: Callable[[int], RankPool], world: int, zero: int, changes: dict[str, Any]
) -> None:
    """Five steps of eight micro batches over all ranks, some wholly masked."""
    alone = run(-1, False, 5, changes)
    results = ranks(world).run(run, zero, True, 5, changes)
    for result in results:
        # As for other data-parallel runs: sums in another order, and AdamW's share of lr (test_hybrid_zero.check).
        torch.testing.assert_close(result["losses"], alone["losses"], rtol=1e-5, atol=0)
        torch.testing.assert_close(result["norms"], alone["norms"], rtol=1e-4, atol=0)
        torch.testing.assert_close(result["weights"], alone["weights"], rtol=0, atol=0.01 * RATE * 5)
    gradients, expected = whole_gradients(results), whole_gradients([alone])
    # The clipped gradient has norm 0.5; weights differ by 1e-4 of their way at most, and gradients follow them.
    torch.testing.assert_close(gradients, expected, rtol=0, atol=1e-5)


def test_the_ranks_and_steps_of_zero_and_fsdp_agree_bit_for_bit(ranks: Callable[[int], RankPool]) -> None:
    """On two ranks with one micro batch each, both ways add the same two numbers: the same bits come out."""
    zero = ranks(2).run(run_two_samples, False)
    fsdp = ranks(2).run(run_two_samples, True)
    assert fsdp[0][0] == fsdp[1][0] == zero[0][0]
    for weights in (fsdp[0][1], fsdp[1][1]):
        assert all(torch.equal(weights[name], zero[0][1][name]) for name in weights)


def run_two_samples(fsdp: bool) -> tuple[list[float], dict[str, Tensor]]:
    context = context_of()
    model = tiny_model(context)
    engine = tiny_engine(context, model=apply_fsdp(model, context) if fsdp else model, weight_decay=0.1)
    losses = [float(engine.train_step(global_batch(step, 2, context.rank, 2), RATE).loss) for step in range(3)]
    weights = weights_of(model)
    context.close()
    return losses, weights


def torch_fsdp(steps: int) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """The textbook loop: fully_shard, mean gradients, torch.optim.AdamW on DTensors, torch's clipping."""
    context = context_of()
    rank, world = context.rank, context.world_size
    model = tiny_model(context)
    for layer in model.layers.values():  # type: ignore[union-attr,operator]
        fully_shard(layer)
    fully_shard(model)
    specs = {name: shard_spec_of(parameter) for name, parameter in tiny_model(context).named_parameters()}
    for name, parameter in model.named_parameters():
        attach_shard_spec(parameter, rows_of(specs[name], world, rank))
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95))
    losses, norms = [], []
    for step in range(steps):
        adamw.zero_grad()
        valid = global_batch(step, 8).num_valid_tokens
        loss_sum = torch.zeros(())
        for micro in global_batch(step, 8, rank, world).micro_batches:
            hidden = model(micro.input_ids, micro.position_ids, VarlenMetadata.of(micro.lengths))  # type: ignore[arg-type]
            logits = hidden[0] @ model.head_weight().t()  # type: ignore[operator]
            loss = F.cross_entropy(logits, micro.labels[0], reduction="sum") / valid
            (loss * world).backward()
            loss_sum += loss.detach()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        norms.append(float(norm.full_tensor()))  # type: ignore[attr-defined]
        adamw.step()
        torch.distributed.all_reduce(loss_sum)
        losses.append(float(loss_sum))
    weights = weights_of(model)
    context.close()
    return losses, norms, weights


def test_fsdp_equals_torchs_own_loop(ranks: Callable[[int], RankPool]) -> None:
    # DTensor remembers meshes of the same ranks, and with them process groups of tests before: so ranks of its own.
    pool = RankPool(2)
    losses, norms, weights = pool.run(torch_fsdp, 5)[0]
    pool.close()
    result = ranks(2).run(run, -1, True, 5, {})[0]
    torch.testing.assert_close(result["losses"], losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(result["norms"], norms, rtol=1e-4, atol=0)
    torch.testing.assert_close(result["weights"], weights, rtol=0, atol=0.01 * RATE * 5)


# -- number formats -------------------------------------------------------------------------------------------------


def bf16_gradients(fsdp: bool) -> list[Any]:
    context = context_of()
    with torch.device("meta"):
        model = build_model("INTERNLM2", tiny_config(dtype="torch.bfloat16"), norm_dtype=torch.float32)
    parallelize(model, context, seed=7)
    if fsdp:
        apply_fsdp(model, context, reduce_dtype=torch.float32)
        dtypes = {type(p): {q.dtype for q in model.parameters() if type(q) is type(p)} for p in model.parameters()}
        assert dtypes == {DTensor: {torch.bfloat16}, nn.Parameter: {torch.float32}} or dtypes == {
            nn.Parameter: {torch.bfloat16, torch.float32}
        }
    engine = tiny_engine(context, model=model)
    engine.train_step(global_batch(0, 2, context.rank, 2), RATE)
    gradients = [
        (name, shard_spec_of(parameter).global_shape, [(box, piece.clone()) for box, piece in pieces])
        for name, parameter, pieces in engine.optimizer.sharded_gradients()  # type: ignore[attr-defined]
    ]
    context.close()
    return gradients


def test_bf16_gradients_are_summed_in_fp32_and_fp32_norms_stay_whole(ranks: Callable[[int], RankPool]) -> None:
    """With one micro batch a rank, FSDP rounds the fp32 sum of two ranks to bf16 once, which plain ZeRO does not."""
    zero = whole_gradients([{"gradients": g} for g in ranks(2).run(bf16_gradients, False)])
    fsdp = whole_gradients([{"gradients": g} for g in ranks(2).run(bf16_gradients, True)])
    assert zero.keys() == fsdp.keys()
    for name, exact in zero.items():
        if exact.ndim == 1:
            assert torch.equal(fsdp[name], exact), name
        else:
            assert torch.equal(fsdp[name], exact.bfloat16().float()), name


# -- hand-made shards -----------------------------------------------------------------------------------------------


class WeightedModel(ShardedModel):
    """A forward pass whose gradients are those of `deliver`."""

    def run_backward(self, step: int) -> None:
        self(step).backward()

    def forward(self, step: int) -> Tensor:
        total = torch.zeros((), requires_grad=True)
        for parameter, spec in zip(self.parts, self._specs(), strict=True):
            total = total + (parameter * self.share_of(spec, step)).sum()
        return total


def train_by_hand(name: str) -> dict[str, Any]:
    """As in test_hybrid_zero_shards, through FSDP."""
    context = ParallelContext.create(LAYOUTS[name])
    model = WeightedModel(context)
    apply_fsdp(model, context)
    optimizer = new_optimizer(model)
    assert all(isinstance(bucket, FsdpBucket) for bucket in optimizer.buckets)
    return train_shards(model, optimizer)


@pytest.mark.parametrize("name", ["data", "tensor x data", "zero x replicas", "data x context", "context x tensor"])
def test_rows_of_tensor_shards_take_the_same_steps(ranks: Callable[[int], RankPool], name: str) -> None:
    """FSDP on what a tensor mode left: uneven rows, ranks without any, parts of one name, a padded vocabulary."""
    assert_trained_as_whole(ranks(LAYOUTS[name].world_size).run(train_by_hand, name))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 9), st.integers(1, 3), st.integers(1, 5), st.data())
def test_rows_cover_every_box_once(rows: int, columns: int, size: int, data: st.DataObject) -> None:
    """Against torch.chunk on a fused local tensor with two boxes."""
    cut = data.draw(st.integers(0, rows))
    whole = torch.arange(20 * columns).view(20, columns)
    boxes = (Box((3, 0), (0, 0), (cut, columns)), Box((11, 0), (cut, 0), (rows - cut, columns)))
    spec = ShardSpec("w", (20, columns), (rows, columns), tuple(box for box in boxes if math.prod(box.size)))
    local = torch.cat([whole[3 : 3 + cut], whole[11 : 11 + rows - cut]])
    chunks = [*local.chunk(size), *[local[:0]] * size][:size]
    for index, chunk in enumerate(chunks):
        part = rows_of(spec, size, index)
        assert part.local_shape == tuple(chunk.shape)
        assert part.sharded_over == ("zero",)
        filled = torch.full(part.local_shape, -1)
        for box in part.boxes:
            filled[box.local_slices()] = whole[box.global_slices()]
        assert torch.equal(filled, chunk)


# -- what is refused ------------------------------------------------------------------------------------------------


def test_without_zero_ranks_nothing_is_sharded() -> None:
    context = context_of()
    model = tiny_model(context)
    assert not any(isinstance(parameter, DTensor) for parameter in apply_fsdp(model, context).parameters())


def layouts_that_are_refused() -> None:
    for layout, message in (
        (ParallelLayout(world_size=2, pipeline=2), "fsdp = True does not work with pipeline = 2"),
        (
            ParallelLayout(world_size=2, mode="isp", weight=2),
            "fsdp = True does not work with mode = 'isp', which splits",
        ),
    ):
        context = ParallelContext.create(layout)
        with pytest.raises(ConfigError, match=message):
            apply_fsdp(nn.Linear(2, 2), context)
        # A rank that closes its connections while the other one is still making them would break these.
        torch.distributed.barrier()
        context.close()


def test_layouts_that_do_not_go_together_are_refused_by_name(ranks: Callable[[int], RankPool]) -> None:
    ranks(2).run(layouts_that_are_refused)
