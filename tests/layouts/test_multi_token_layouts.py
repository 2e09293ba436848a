"""Layers that predict later tokens: left and taken up again, and defects of layouts that the comparison finds.

The matrices of layouts have these layers, too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.layouts import reference_of
from helpers.resume import Ranks, run_row

from internlm.core import multi_token_loss
from internlm.core.multi_token_loss import LaterTokens, later_tokens
from internlm.data.batch import MicroBatch
from internlm.verify.case import Case, Combination
from internlm.verify.record import InconsistentRanksError, RankRecord, join_ranks
from internlm.verify.report import judge
from internlm.verify.run import run_case


@pytest.mark.parametrize(
    "row",
    [
        "ranks=2 layout:pipeline=2,schedule=ZBV model:multi_token=2,tied=true,dtype=float64",
        "ranks=4 layout:tensor=2,mode=isp,weight=2,expert=2 "
        "model:family=QWEN3MOE,experts=4,multi_token=1,dtype=float64",
    ],
)
def test_a_run_is_left_and_taken_up_again(row: str, ranks: Ranks, tmp_path: Path) -> None:
    """By itself, bit for bit; by one process; and from a checkpoint of one process."""
    found = run_row(Combination.parse(row), ranks, tmp_path)
    assert found.straight.is_equal, found.straight.explain()
    assert not any(found.resumed), found.resumed
    assert found.from_one_process.is_equal, found.from_one_process.explain()


def with_tokens_of_a_part(case: Case) -> RankRecord:
    """Each rank takes later tokens from its own part of the sequence, and so none at the end of the part."""

    def of_a_part(micro: MicroBatch, offset: int) -> LaterTokens:
        ids, labels = later_tokens(micro, offset)
        half = ids.shape[1] // 2
        at_end = torch.arange(ids.shape[1]) % half >= half - offset
        return LaterTokens(ids.masked_fill(at_end, 0), labels)

    return _with(of_a_part, case)


def with_a_mean_of_each_rank(case: Case) -> RankRecord:
    """Each data rank divides by the number of its own labels."""
    right = multi_token_loss.all_reduce
    multi_token_loss.all_reduce = lambda tensor, group: tensor * 2
    try:
        return run_case(case, 1)
    finally:
        multi_token_loss.all_reduce = right


def _with(function: Any, case: Case) -> RankRecord:
    multi_token_loss.later_tokens = function
    try:
        return run_case(case, 1)
    finally:
        multi_token_loss.later_tokens = later_tokens


def test_a_shift_within_the_part_of_a_rank_is_found(ranks: Ranks) -> None:
    case = Combination.parse("ranks=2 layout:tensor=2,mode=isp model:multi_token=1,dtype=float64").case()
    verdict = judge(case, join_ranks(ranks(2).run(with_tokens_of_a_part, case)), reference_of(case, ranks, 1))
    assert any("gradient of layers.2.eh_proj.weight" in difference.what for difference in verdict.differences)


def test_a_mean_of_each_rank_is_found(ranks: Ranks) -> None:
    case = Combination.parse("ranks=2 model:multi_token=1,dtype=float64").case()
    with pytest.raises(InconsistentRanksError, match="multi_token/loss/1"):
        join_ranks(ranks(2).run(with_a_mean_of_each_rank, case))
