"""Mixtures of experts where experts have no token or all of them, gradients are NaN, or a rank dies in an exchange."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.layouts import STEPS
from helpers.resume import Ranks, tensors_of
from torch import Tensor

from internlm.core.parallel.fsdp import local_tensor
from internlm.core.step_metrics import StepMetrics
from internlm.data.batch import MicroBatch
from internlm.model.moe import router
from internlm.verify.batches import local_batch
from internlm.verify.case import Case, Combination
from internlm.verify.ranks import LocalRanks, RankFailedError
from internlm.verify.record import RankRecord, join_ranks
from internlm.verify.report import judge
from internlm.verify.run import CaseRun, run_case, start_case

MODEL = "model:family=QWEN3MOE,experts=8,dtype=float64"

LAYOUTS = (
    "ranks=4 layout:expert=4",
    "ranks=4 layout:tensor=2,mode=mtp,expert=2,expert_tensor",
    "ranks=4 layout:tensor=2,mode=msp,expert=4",
    "ranks=4 layout:tensor=2,mode=isp,weight=2,expert=2,expert_weight=2,expert_overlap",
    "ranks=2 layout:fsdp",
    "ranks=4 layout:pipeline=2,schedule=ZBV,expert=2",
)

Choice = Callable[[Tensor, Any, Any], Tensor]


def the_first(scores: Tensor, form: Any, bias: Any) -> Tensor:
    """All tokens choose the same experts, which the first rank has."""
    return torch.arange(form.top_k).expand(scores.shape[0], -1).contiguous()


def the_last(scores: Tensor, form: Any, bias: Any) -> Tensor:
    return form.num_experts - 1 - the_first(scores, form, bias)


CHOICES: dict[str, Choice] = {"the first": the_first, "the last": the_last}


def run_with(case: Case, choice: str) -> RankRecord:
    """A run whose routers choose so, on each rank."""
    right = router.choose_experts
    router.choose_experts = CHOICES[choice]  # type: ignore[assignment]
    try:
        return run_case(case, STEPS)
    finally:
        router.choose_experts = right


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_some_ranks_get_all_rows_and_others_none(layout: str, choice: str, ranks: Ranks) -> None:
    case = Combination.parse(f"{layout} {MODEL},top_k=1,checkpoint=0.5").case()
    expected = join_ranks(ranks(1).run(run_with, case.reference(), choice))
    verdict = judge(case, join_ranks(ranks(case.world_size).run(run_with, case, choice)), expected)
    assert verdict.is_equal, verdict.explain()
    assert expected.steps[0].routing["moe/load/0"] == 8


@pytest.mark.parametrize("model", ["experts=64,top_k=1", "experts=64,top_k=64", "experts=16,top_k=3"])
@pytest.mark.parametrize("layout", LAYOUTS[:3])
def test_there_are_more_experts_than_tokens(layout: str, model: str, ranks: Ranks) -> None:
    """A micro-batch has 32 tokens, half of them on each tensor rank."""
    case = Combination.parse(f"{layout} {MODEL},{model}").case()
    expected = join_ranks(ranks(1).run(run_case, case.reference(), STEPS))
    verdict = judge(case, join_ranks(ranks(case.world_size).run(run_case, case, STEPS)), expected)
    assert verdict.is_equal, verdict.explain()


def train_with_nan(case: Case) -> tuple[list[float], list[bool]]:
    """Whether each step was skipped, and whether all weights and moments kept their bits; NaN is in the second step."""
    context = start_case(case)
    run = CaseRun(case, context)
    skipped, kept = [], []
    weights = [
        local_tensor(p) for chunk in run.trainer.engine.chunks for n, p in chunk.named_parameters() if "tok" in n
    ]
    for step in (1, 2, 3):
        before = [piece.values.copy() for piece in tensors_of(run.trainer)]
        originals = [weight.detach().clone() for weight in weights]
        if step == 2:
            # The embedding of one token, which hardly every micro-batch has.
            for weight in weights:
                weight.data[5 if len(weight) > 5 else 0] = torch.nan
        batch = local_batch(case, step - 1, context.index("data"), context.size("data"))
        metrics: StepMetrics = run.trainer.engine.train_step(batch, 1e-3)
        run.trainer.engine.optimizer.finish_gathering()
        skipped.append(float(metrics.skipped))
        if step == 2:
            for weight, original in zip(weights, originals, strict=True):
                weight.data.copy_(original)
        after = [piece.values for piece in tensors_of(run.trainer)]
        kept.append(all(a.tobytes() == b.tobytes() for a, b in zip(before, after, strict=True)))
    context.close()
    return skipped, kept


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if "fsdp" not in layout])
def test_a_step_with_nan_is_skipped_by_all_ranks(layout: str, ranks: Ranks) -> None:
    case = Combination.parse(f"{layout} {MODEL},top_k=2,router=biased").case()
    for skipped, kept in ranks(case.world_size).run(train_with_nan, case):
        assert skipped == [0.0, 1.0, 0.0]
        assert kept == [False, True, False]


EXCHANGE_OF_A_RANK_THAT_DIES = """
import os
import torch.distributed as dist
from internlm.core.parallel.experts import exchanged_experts
from internlm.core.parallel.linear.weight_gathering import GatheredWeights

real, calls = {owner}.{name}, []

def exchange(*args, **kwargs):
    calls.append(1)
    if dist.get_rank() == 1 and len(calls) == {call}:
        os._exit(7)
    try:
        return real(*args, **kwargs)
    except RuntimeError as error:
        open(f"{folder}/{{dist.get_rank()}}", "w").write(str(error))
        raise

{owner}.{name} = exchange
"""


@pytest.mark.parametrize(
    ("layout", "owner", "name", "call"),
    [
        ("expert=2", "exchanged_experts", "_exchange", 1),
        ("expert=2", "exchanged_experts", "_exchange", 6),
        ("mode=isp,expert_weight=2", "GatheredWeights", "acquire", 8),
    ],
    ids=["dispatch", "backward", "weights"],
)
def test_a_rank_that_dies_in_an_exchange_ends_the_others(
    layout: str, owner: str, name: str, call: int, tmp_path: Path
) -> None:
    config = tmp_path / "config.py"
    config.write_text(EXCHANGE_OF_A_RANK_THAT_DIES.format(owner=owner, name=name, call=call, folder=tmp_path))
    case = Combination.parse(f"ranks=2 layout:{layout} {MODEL}").case()
    started = time.monotonic()
    with (
        LocalRanks(2, config) as ranks,
        pytest.raises(RankFailedError, match="rank 1 ended without an answer") as caught,
    ):
        ranks.run(case, 1)
    assert "exit code 7" in str(caught.value)
    assert time.monotonic() - started < 30
    assert "onnection" in (tmp_path / "0").read_text()  # closed or reset


def evaluate_in_between(case: Case) -> tuple[RankRecord, RankRecord, float]:
    """Two runs, one of which evaluates before its second step; and the largest difference of a loss to training."""
    context = start_case(case)
    straight, evaluated = CaseRun(case, context), CaseRun(case, context)
    for run in (straight, evaluated):
        run.train(1)
    losses: list[Tensor] = []

    class Sink:
        def update(self, token_losses: Tensor, correct: Tensor, labels: Tensor, type_ids: Tensor) -> None:
            losses.append(token_losses.double().sum())

    batch = local_batch(case, 1, context.index("data"), context.size("data"))
    micro_batches: list[MicroBatch] = batch.micro_batches
    for micro in micro_batches:
        evaluated.trainer.engine.evaluate(micro, Sink())  # type: ignore[arg-type]
    for run in (straight, evaluated):
        run.train(2)
    valid = sum(micro.num_valid_tokens for micro in micro_batches)
    difference = abs(float(sum(losses)) / valid - straight.record.steps[1].loss) if losses else 0.0
    context.close()
    return straight.record, evaluated.record, difference


@pytest.mark.parametrize("layout", ["ranks=1", "ranks=2 layout:tensor=2,mode=mtp,expert=2"])
def test_evaluation_adds_no_loss_and_counts_nothing(layout: str, ranks: Ranks) -> None:
    case = Combination.parse(f"{layout} {MODEL},top_k=2").case()
    for straight, evaluated, difference in ranks(case.world_size).run(evaluate_in_between, case):
        assert difference < 1e-5
        for one, other in zip(straight.steps, evaluated.steps, strict=True):
            assert one.routing and one.routing == other.routing
            assert (one.loss, one.grad_norm) == (other.loss, other.grad_norm)
