"""What routers count and balance: tokens of documents, not padding; and each sequence by itself."""

from __future__ import annotations

import dataclasses

import pytest
from helpers.layouts import STEPS, record_of, reference_of
from helpers.resume import Ranks

from internlm.data.batch import MicroBatch
from internlm.verify import batches
from internlm.verify.case import Case, Combination, changed
from internlm.verify.record import RankRecord, join_ranks
from internlm.verify.report import judge
from internlm.verify.run import run_case

MODEL = "model:family=QWEN3MOE,experts=8,top_k=3,router=sigmoid_grouped,dtype=float64 documents:packed=false"

LAYOUTS = ("ranks=1", "ranks=2 layout:tensor=2,mode=mtp,expert=2", "ranks=2 layout:tensor=2,mode=msp")


def run_with_other_padding(case: Case) -> RankRecord:
    """A run whose rows are padded with another token."""
    right = batches._micro_batch

    def micro_batch(case: Case, index: int) -> MicroBatch:
        micro = right(case, index)
        assert micro.is_padding is not None
        return dataclasses.replace(micro, input_ids=micro.input_ids.masked_fill(micro.is_padding, 7))

    batches._micro_batch = micro_batch
    try:
        return run_case(case, STEPS)
    finally:
        batches._micro_batch = right


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_changes_nothing(layout: str, ranks: Ranks) -> None:
    case = Combination.parse(f"{layout} {MODEL}").case()
    other = join_ranks(ranks(case.world_size).run(run_with_other_padding, case))
    verdict = judge(case, other, reference_of(case, ranks))
    assert verdict.is_equal, verdict.explain()


def test_padding_that_counts_is_found(ranks: Ranks) -> None:
    """The comparison above fails without the mask."""
    case = Combination.parse(f"ranks=1 {MODEL}").case()
    (record,) = ranks(1).run(run_without_mask, case)
    verdict = judge(case, join_ranks([record]), reference_of(case, ranks))
    found = {difference.what for difference in verdict.differences}
    assert {"moe/balance_loss", "moe/z_loss", "moe/sequence_loss", "moe/max_load"} <= found


def run_without_mask(case: Case) -> RankRecord:
    right = batches._micro_batch

    def micro_batch(case: Case, index: int) -> MicroBatch:
        return dataclasses.replace(right(case, index), is_padding=None, num_padding_tokens=0)

    batches._micro_batch = micro_batch
    try:
        return run_case(case, STEPS)
    finally:
        batches._micro_batch = right


def test_the_gradient_of_a_router_has_the_loss_of_sequences(ranks: Ranks) -> None:
    case = Combination.parse(f"ranks=1 {MODEL}").case()
    without = Case(changed(case.config, {"loss.moe_sequence_loss_coeff": 0.0}), 1, case.documents)
    verdict = judge(case, record_of(without, ranks), reference_of(case, ranks))
    amounts = {difference.what: difference.amount for difference in verdict.differences if difference.step == 1}
    assert amounts["gradient of layers.0.feed_forward.router.weight"] > 1e-2
