"""bf16 gradients, bf16 moments and offloading: each against the same thing done by hand, or without it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.late_copies import LateCopyStream
from helpers.ranks import RankPool
from helpers.runs import assert_same_bits, weights_of
from helpers.sharded import LAYOUTS, ShardedModel, assemble, state_pieces
from helpers.tiny import global_batch, tiny_engine, tiny_model
from torch import Tensor, nn

import internlm.solver.optimizer.shard_updaters as updates
from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.fsdp import apply_fsdp
from internlm.core.parallel.shard_spec import Box
from internlm.model.ops.attention.causal_attention import VarlenMetadata
from internlm.model.ops.cross_entropy import LossOutput, linear_cross_entropy
from internlm.solver.grad_scaler import DynamicGradScaler
from internlm.solver.optimizer.bucket import ALIGNMENT
from internlm.solver.optimizer.gradient_clipping import CLIP_EPSILON
from internlm.solver.optimizer.hybrid_zero import HybridZeroOptimizer
from internlm.solver.optimizer.state_form import FP32_STATE, StateForm

LR, DECAY, STEPS = 3e-3, 0.1, 4
BF16 = torch.bfloat16
OFFLOADED = StateForm(is_offloaded=True)
FORMS = {
    f"{gradients}-{moments}{'-offloaded' * offloaded}".replace("torch.", ""): StateForm(gradients, moments, offloaded)
    for offloaded, gradients, moments in itertools.product((False, True), (torch.float32, BF16), (torch.float32, BF16))
}


@contextmanager
def parts_of(size: int | None) -> Iterator[None]:
    """Inside, shards are updated in parts of that many elements."""
    before = updates.part_size
    if size is not None:
        updates.part_size = lambda device: size
    yield
    updates.part_size = before


def run(
    form: StateForm,
    dtype: str = "torch.bfloat16",
    zero: int = -1,
    fsdp: bool = False,
    bad: Sequence[int] = (),
    at_once: int | None = 7 * ALIGNMENT,
) -> dict[str, Any]:
    """Some steps of the tiny model on this process's ranks; before steps in `bad` comes one whose gradient is NaN."""
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    context = ParallelContext.create(ParallelLayout(world_size=world, zero=zero))
    model = tiny_model(context, dtype=dtype)
    with parts_of(at_once):
        engine = tiny_engine(
            context,
            DynamicGradScaler(1024.0, hysteresis=1) if dtype == "torch.float16" else None,
            apply_fsdp(model, context) if fsdp else model,
            weight_decay=DECAY,
            clip_grad_norm=0.5,
            reduce_bucket_size=3000,
            form=form,
        )
    optimizer, good = engine.optimizer, engine.loss
    assert isinstance(optimizer, HybridZeroOptimizer)

    def nan(*args: Tensor) -> LossOutput:
        return good(*args)._replace(loss_sum=good(*args).loss_sum * torch.nan)

    seen: dict[str, Any] = {"norms": []}
    for step in range(STEPS):
        if step in bad:
            engine.loss = nan
            assert float(engine.train_step(global_batch(9, 4, context.rank, world), LR).skipped) == 1.0
            engine.loss = good
        result = engine.train_step(global_batch(step, 4, context.rank, world), LR)
        assert float(result.skipped) == 0.0
        seen["norms"].append(float(result.grad_norm))
    optimizer.finish_gathering()
    for what, found in (("state", optimizer.sharded_state()), ("gradients", optimizer.sharded_gradients())):
        seen[what] = {f"{key} {n}": p.clone() for key, *_, pieces in found for n, (_, p) in enumerate(pieces)}
    seen["weights"] = weights_of(engine.model)
    seen["updates"] = optimizer.num_updates
    context.close()
    return seen


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Two runs saw and left the same bits."""
    assert (found["norms"], found["updates"]) == (expected["norms"], expected["updates"])
    for what in ("weights", "state", "gradients"):
        assert_same_bits(found[what], expected[what])


# -- offloading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16", "torch.float16"])
@pytest.mark.parametrize("name", [name for name in FORMS if not FORMS[name].is_offloaded])
def test_offloading_changes_no_bit(name: str, dtype: str) -> None:
    """Also when updates are skipped, in fp16 with a loss scale that falls then."""
    form = FORMS[name]
    assert_same(run(replace(form, is_offloaded=True), dtype, bad=(0, 2)), run(form, dtype, bad=(0, 2)))


@pytest.mark.parametrize("form", [OFFLOADED, StateForm(BF16, BF16, is_offloaded=True)], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("world", "zero", "fsdp"), [(2, -1, False), (2, 1, False), (4, 2, False), (2, -1, True)])
def test_offloading_changes_no_bit_on_several_ranks(
    ranks: Callable[[int], RankPool], world: int, zero: int, fsdp: bool, form: StateForm
) -> None:
    expected = ranks(world).run(run, replace(form, is_offloaded=False), "torch.bfloat16", zero, fsdp)
    found = ranks(world).run(run, form, "torch.bfloat16", zero, fsdp)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("name", FORMS)
def test_a_skipped_update_leaves_no_trace(name: str) -> None:
    assert_same(run(FORMS[name], bad=(0, 2)), run(FORMS[name]))


def test_copies_may_take_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read before it has arrived, and nothing is overwritten that has not left."""
    expected = run(OFFLOADED)
    monkeypatch.setattr(updates, "copy_stream_of", lambda device: LateCopyStream())
    assert_same(run(OFFLOADED), expected)


# -- parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in FORMS if FORMS[name] != FP32_STATE])
def test_parts_change_no_bit(name: str) -> None:
    whole = run(FORMS[name], at_once=None)
    for size in (ALIGNMENT, 9 * ALIGNMENT):
        assert_same(run(FORMS[name], at_once=size), whole)


# -- gradients in bf16 ----------------------------------------------------------------------------------------------


def test_gradients_in_bf16_are_those_summed_by_hand() -> None:
    """Accumulated in bf16 with torch's own addition; their norm and the update are computed in fp32 and higher."""
    context = ParallelContext.create()
    with parts_of(7 * ALIGNMENT):
        engine = tiny_engine(
            context, model=tiny_model(context, dtype="torch.bfloat16"), weight_decay=DECAY, form=StateForm(BF16)
        )
    model = tiny_model(context, dtype="torch.bfloat16")
    masters = {name: nn.Parameter(p.detach().float()) for name, p in model.named_parameters()}
    groups = [
        {"params": [p for p in masters.values() if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in masters.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), fused=True)
    for step in range(STEPS):
        batch = global_batch(step)
        result = engine.train_step(batch, LR)
        for micro in batch.micro_batches:
            hidden = model(micro.input_ids, micro.position_ids, VarlenMetadata.of(micro.lengths))  # type: ignore[arg-type]
            loss = linear_cross_entropy(hidden[0], model.head_weight(), micro.labels[0]).loss_sum  # type: ignore[operator]
            # torch adds gradients in the dtype of the parameter.
            (loss * (torch.tensor(1.0) / batch.num_valid_tokens)).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            masters[name].grad, parameter.grad = parameter.grad.float(), None
        squares = torch.stack([p.grad.double().square().sum() for p in masters.values()])  # type: ignore[union-attr]
        # Each row of 1024 is summed in fp32: eleven roundings at most, of which a square root halves the sum.
        torch.testing.assert_close(float(result.grad_norm), float(squares.sum().sqrt()), rtol=6 * 2**-24, atol=0)
        adamw.step()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(masters[name])
        assert_same_bits(weights_of(engine.model), weights_of(model))
    context.close()


def clipped(form: StateForm, clip: float) -> tuple[float, dict[str, Tensor]]:
    context = ParallelContext.create()
    model = tiny_model(context, dtype="torch.bfloat16")
    engine = tiny_engine(context, model=model, clip_grad_norm=clip, form=form)
    norm = float(engine.train_step(global_batch(0), LR).grad_norm)
    assert isinstance(engine.optimizer, HybridZeroOptimizer)
    gradients = {name: pieces[0][1].clone() for name, _, pieces in engine.optimizer.sharded_gradients()}
    context.close()
    return norm, gradients


@pytest.mark.parametrize("name", FORMS)
def test_the_gradients_that_are_shown_are_those_that_were_applied(name: str) -> None:
    """Clipped, in fp32; whether they are divided in place or not."""
    norm, whole = clipped(FORMS[name], 0.0)
    _, gradients = clipped(FORMS[name], 0.5)
    assert norm > 0.5
    divisor = (torch.tensor(norm) + CLIP_EPSILON) / 0.5
    assert_same_bits(gradients, {name: gradient / divisor for name, gradient in whole.items()})


# -- moments in bf16 ------------------------------------------------------------------------------------------------


def moments_in(name: str | None) -> list[tuple[str, list[tuple[Box, Tensor]]]]:
    """Of hand-made shards after three steps; None for one process."""
    model = ShardedModel(ParallelContext.create(LAYOUTS[name] if name else None))
    form = StateForm(moments=BF16)
    optimizer = HybridZeroOptimizer(model, model.context, reduce_bucket_size=40, form=form)
    for step in range(3):
        optimizer.begin_step(1)
        model.run_backward(step)
        optimizer.step(LR)
    pieces = [(key, [(box, piece.float()) for box, piece in boxes]) for key, boxes in state_pieces(optimizer)]
    model.context.close()
    return pieces


@pytest.mark.parametrize("name", ["tensor", "pipeline x tensor", "tensor x data", "isp"])
def test_moments_are_rounded_alike_in_every_layout(ranks: Callable[[int], RankPool], name: str) -> None:
    """Bit for bit where gradients are not summed in another order: of weights that are split, on one data rank."""
    expected = assemble([moments_in(None)])
    found = assemble(ranks(LAYOUTS[name].world_size).run(moments_in, name))
    exact = [key for key in expected if key.split("/")[-1].endswith("wo")]
    assert len(exact) == 4
    for key in expected:
        if key in exact and name in ("tensor", "pipeline x tensor"):
            assert torch.equal(found[key], expected[key]), key
        # Others have nearly the same gradients and the same random numbers: at most a few are rounded the other way.
        assert (found[key] != expected[key]).float().mean() < 0.1, key
