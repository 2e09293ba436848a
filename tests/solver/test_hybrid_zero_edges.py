"""What could go silently wrong in the sharded optimizer: NaN gradients, gathers that are late, odd parameters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import RankPool
from helpers.runs import Record, assert_same_bits, new_trainer, weights_of
from helpers.tiny import global_batch, tiny_config, tiny_engine, tiny_model
from torch import Tensor, nn

import internlm.solver.optimizer.flat_bucket as flat_bucket
from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.hooks import Hook
from internlm.core.parallel.model_parallel import parallel_of
from internlm.core.parallel.parallelize import parallelize
from internlm.core.parallel.shard_spec import ShardSpec, attach_shard_spec
from internlm.data.batch import Batch
from internlm.model.ops.attention.causal_attention import VarlenMetadata
from internlm.model.ops.cross_entropy import LossOutput, linear_cross_entropy
from internlm.model.registry import build_model
from internlm.solver.optimizer.state_form import FP32_STATE, StateForm

LR = 3e-3


def context_of(zero: int = -1) -> ParallelContext:
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    return ParallelContext.create(ParallelLayout(world_size=world, zero=zero))


def share(step: int, context: ParallelContext) -> Batch:
    return global_batch(step, 4, context.rank, context.world_size)


# -- NaN ------------------------------------------------------------------------------------------------------------


def with_a_bad_step(zero: int, bad: int | None) -> tuple[list[float], dict[str, Tensor]]:
    """Three good steps, and a batch whose loss is NaN before step `bad`: which updates are skipped, and the weights."""
    context = context_of(zero)
    engine = tiny_engine(context, clip_grad_norm=0.5, weight_decay=0.1, reduce_bucket_size=3000)
    good = engine.loss

    def nan(*args: Tensor) -> LossOutput:
        return good(*args)._replace(loss_sum=good(*args).loss_sum * torch.nan)

    skipped = []
    for step in range(3):
        if step == bad:
            engine.loss = nan
            skipped.append(float(engine.train_step(share(9, context), LR).skipped))
            engine.loss = good
        skipped.append(float(engine.train_step(share(step, context), LR).skipped))
    engine.optimizer.finish_gathering()
    weights = weights_of(engine.model)
    context.close()
    return skipped, weights


@pytest.mark.parametrize(("world", "zero"), [(1, -1), (2, 1), (2, -1), (4, 2)])
def test_a_nan_gradient_leaves_no_trace(ranks: Callable[[int], RankPool], world: int, zero: int) -> None:
    """The update is skipped, and the next ones are those of a run that never saw the batch, bit for bit."""
    run = ranks(world).run if world > 1 else lambda function, *args: [function(*args)]
    clean = run(with_a_bad_step, zero, None)
    for (skipped, weights), (_, expected) in zip(run(with_a_bad_step, zero, 1), clean, strict=True):
        assert skipped == [0.0, 1.0, 0.0, 0.0]
        assert_same_bits(weights, expected)


# -- late gathers ---------------------------------------------------------------------------------------------------


class Late:
    """A collective that does not happen before somebody waits for it: the worst case of an overlapped one."""

    def __init__(self, start: Callable[[], Any]) -> None:
        self._start: Callable[[], Any] | None = start

    def wait(self) -> None:
        if self._start is not None:
            start, self._start = self._start, None
            start().wait()


def run_with_evaluation(folder: str, late: bool, model: dict[str, Any]) -> dict[str, Any]:
    """Four steps, evaluated after odd ones and saved after even ones; then the fourth is loaded and two more follow."""
    real = flat_bucket.all_gather_async
    if late:
        flat_bucket.all_gather_async = lambda *args: Late(partial(real, *args))  # type: ignore[assignment,return-value]
    try:
        results: list[dict[str, float]] = []

        class Evaluate(Hook):
            def on_step_end(self, trainer: Any, metrics: Any) -> None:
                if metrics.step % 2 == 1:
                    results.append(trainer.evaluate())

        def trainer_to(total_steps: int) -> Any:
            trainer = new_trainer(folder, total_steps, every=2, hooks=[record, Evaluate()], **model)
            rank, size = trainer.context.rank, trainer.context.world_size
            trainer.valid_sets = {"books": [global_batch(50, 4, rank, size)]}
            return trainer

        record = Record()
        trainer_to(4).fit()
        resumed = trainer_to(6)
        resumed.checkpointer.load(resumed, Path(folder) / "4")
        resumed.fit()
        resumed.engine.optimizer.finish_gathering()
        return {"losses": record.losses, "evaluations": results, "weights": weights_of(resumed.engine.model)}
    finally:
        flat_bucket.all_gather_async = real


@pytest.mark.parametrize(
    "model",
    [
        {"dtype": "torch.bfloat16"},
        {"tie_word_embeddings": True},
        {"checkpoint": 1.0},
        {"norm_head": True},
    ],
    ids=["bf16", "tied", "checkpointed", "norm-head"],
)
def test_nobody_reads_a_parameter_before_it_is_gathered(
    tmp_path: Path, ranks: Callable[[int], RankPool], model: dict[str, Any]
) -> None:
    """Forward, evaluation, recomputation and saving right after a step see the updated weights."""
    prompt = ranks(2).run(run_with_evaluation, str(tmp_path / "prompt"), False, model)
    late = ranks(2).run(run_with_evaluation, str(tmp_path / "late"), True, model)
    for expected, result in zip(prompt, late, strict=True):
        assert result["losses"] == expected["losses"]
        assert result["evaluations"] == expected["evaluations"]
        assert_same_bits(result["weights"], expected["weights"])
    assert late[0]["evaluations"] == late[1]["evaluations"]
    assert_same_bits(late[0]["weights"], late[1]["weights"])


def test_fsdp_evaluates_and_saves_between_steps(tmp_path: Path, ranks: Callable[[int], RankPool]) -> None:
    """What a forward pass without a backward left gathered is neither saved nor used in place of loaded weights."""
    zero = ranks(2).run(run_with_evaluation, str(tmp_path / "zero"), False, {})[0]
    for result in ranks(2).run(run_with_evaluation, str(tmp_path / "fsdp"), False, {"fsdp": True}):
        # Sums of micro batches and ranks in another order.
        torch.testing.assert_close(result["losses"], zero["losses"], rtol=1e-5, atol=0)
        torch.testing.assert_close(result["evaluations"], zero["evaluations"], rtol=1e-5, atol=0)
        torch.testing.assert_close(result["weights"], zero["weights"], rtol=0, atol=0.01 * LR * 6)


# -- mixed number formats -------------------------------------------------------------------------------------------


def mixed_model(context: ParallelContext) -> nn.Module:
    """bf16 with fp32 norms, as `use_fp32_norm` makes it: buckets of two dtypes."""
    with torch.device("meta"):
        model = build_model("INTERNLM2", tiny_config(dtype="torch.bfloat16"), norm_dtype=torch.float32)
    return parallelize(model, context, seed=7)


def test_masters_of_mixed_dtypes_equal_adamw_on_fp32_copies() -> None:
    """bf16 weights with fp32 norms: bit for bit AdamW on fp32 copies, cast back after each update."""
    context = ParallelContext.create()
    engine = tiny_engine(context, model=mixed_model(context), weight_decay=0.1, reduce_bucket_size=3000)
    model = mixed_model(context)
    masters = {name: nn.Parameter(p.detach().float()) for name, p in model.named_parameters()}
    decayed = [p for p in masters.values() if p.ndim > 1]
    rest = [p for p in masters.values() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), fused=True)
    for step in range(5):
        batch = global_batch(step)
        result = engine.train_step(batch, LR)
        total = 0.0
        for master in masters.values():
            master.grad = torch.zeros_like(master)
        for micro in batch.micro_batches:
            hidden = model(micro.input_ids, micro.position_ids, VarlenMetadata.of(micro.lengths))  # type: ignore[arg-type]
            loss = linear_cross_entropy(hidden[0], model.head_weight(), micro.labels[0]).loss_sum  # type: ignore[operator]
            total += loss.item()
            (loss * (torch.tensor(1.0) / batch.num_valid_tokens)).backward()
            for name, parameter in model.named_parameters():
                masters[name].grad += parameter.grad  # type: ignore[operator]
                parameter.grad = None
        adamw.step()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(masters[name])
        assert float(result.loss) == pytest.approx(total / batch.num_valid_tokens, rel=1e-6)
        assert_same_bits(weights_of(engine.model), weights_of(model))
    assert {p.dtype for p in engine.model.parameters()} == {torch.bfloat16, torch.float32}


# -- odd parameters -------------------------------------------------------------------------------------------------


class WithOddParameters(nn.Module):
    """The tiny model with a frozen layer, a weight that nobody uses, and one that only some samples use."""

    def __init__(self, inner: nn.Module, width: int = 32) -> None:
        super().__init__()
        self.inner = inner
        self.parallel = parallel_of(inner)
        self.unused = nn.Parameter(torch.ones(5, 7))
        self.sometimes = nn.Parameter(torch.ones(width))
        for parameter in inner.layers["0"].parameters():  # type: ignore[union-attr,operator]
            parameter.requires_grad_(False)
        for name in ("unused", "sometimes"):
            parameter = getattr(self, name)
            attach_shard_spec(parameter, ShardSpec.whole(name, parameter.shape))

    def forward(self, input_ids: Tensor, position_ids: Tensor, varlen: VarlenMetadata | None = None) -> Tensor:
        hidden = self.inner(input_ids, position_ids, varlen)
        return hidden * self.sometimes if int(input_ids.sum()) % 2 else hidden

    def head_weight(self) -> Tensor:
        return self.inner.head_weight()  # type: ignore[operator]


def odd_parameters(zero: int, bucket_size: int, form: StateForm = FP32_STATE) -> dict[str, Any]:
    context = context_of(zero)
    model = WithOddParameters(tiny_model(context))
    engine = tiny_engine(
        context, model=model, weight_decay=0.1, clip_grad_norm=0.5, reduce_bucket_size=bucket_size, form=form
    )
    results = [engine.train_step(share(step, context), LR) for step in range(4)]
    engine.optimizer.finish_gathering()
    weights = weights_of(model)
    context.close()
    return {"losses": [float(r.loss) for r in results], "norms": [float(r.grad_norm) for r in results]} | weights


@pytest.mark.parametrize(("world", "zero", "bucket_size"), [(1, -1, 3000), (2, -1, 3000), (4, 2, 1), (4, -1, 10**9)])
def test_frozen_unused_and_rarely_used_parameters(
    ranks: Callable[[int], RankPool], world: int, zero: int, bucket_size: int
) -> None:
    """Against plain PyTorch; on several ranks only some of them have a gradient of the rarely used weight."""
    context = ParallelContext.create()
    model = WithOddParameters(tiny_model(context))
    before = weights_of(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim > 1]
    rest = [p for p in trained if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95))
    losses, norms, users = [], [], set()
    for step in range(4):
        batch = global_batch(step)
        for parameter in trained:
            # Rarely used means a zero gradient now and then; never used, none at all, which AdamW leaves alone.
            parameter.grad = None if parameter is model.unused else torch.zeros_like(parameter)
        total = 0.0
        for number, micro in enumerate(batch.micro_batches):
            users.add((step, number, int(micro.input_ids.sum()) % 2))
            hidden = model(micro.input_ids, micro.position_ids, VarlenMetadata.of(micro.lengths))  # type: ignore[arg-type]
            logits = hidden[0] @ model.head_weight().t()
            loss = nn.functional.cross_entropy(logits, micro.labels[0], reduction="sum") / batch.num_valid_tokens
            loss.backward()
            total += loss.item()
        losses.append(total)
        norms.append(float(nn.utils.clip_grad_norm_(trained, 0.5)))
        adamw.step()
    # The test is one only if ranks differ: in some step some samples use the weight and some do not.
    assert any({used for s, _, used in users if s == step} == {0, 1} for step in range(4))
    run = ranks(world).run if world > 1 else lambda function, *args: [function(*args)]
    for result in run(odd_parameters, zero, bucket_size):
        torch.testing.assert_close(result.pop("losses"), losses, rtol=1e-5, atol=0)
        torch.testing.assert_close(result.pop("norms"), norms, rtol=1e-4, atol=0)
        for name, weight in result.items():
            if not dict(model.named_parameters())[name].requires_grad:
                assert torch.equal(weight, before[name]), name
            # AdamW moves a weight by up to lr a step however small its gradient: rounding shows as a share of that.
            torch.testing.assert_close(weight, model.get_parameter(name).detach(), rtol=0, atol=0.01 * LR * 4, msg=name)


@pytest.mark.parametrize(("world", "zero", "bucket_size"), [(1, -1, 10**9), (2, -1, 3000), (4, 2, 1)])
def test_the_same_with_an_offloaded_state(
    ranks: Callable[[int], RankPool], world: int, zero: int, bucket_size: int
) -> None:
    """Bit for bit: unused parameters are left out of what goes up and down."""
    run = ranks(world).run if world > 1 else lambda function, *args: [function(*args)]
    expected = run(odd_parameters, zero, bucket_size)
    found = run(odd_parameters, zero, bucket_size, StateForm(is_offloaded=True))
    for one, other in zip(found, expected, strict=True):
        assert (one.pop("losses"), one.pop("norms")) == (other.pop("losses"), other.pop("norms"))
        assert_same_bits(one, other)
