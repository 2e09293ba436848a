"""Every two options of the matrix of expert models meet in a layout that trains as one process does.

Compared in float64, as rounding may change the expert of a token. In every run, the layouts of up to four ranks and a
third of those of eight; with `INTERNLM_FULL_MATRIX=1` all of them, which are left and taken up again too.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.layouts import assert_equal_to_one_process, record_of, reference_of, verdict_of
from helpers.resume import Ranks, run_row

from internlm.core import routing_statistics
from internlm.core.parallel.experts import layers
from internlm.model.moe import router
from internlm.verify.case import Case, Combination, changed
from internlm.verify.matrix import expert_matrix
from internlm.verify.record import RankRecord, join_ranks
from internlm.verify.report import Verdict, judge
from internlm.verify.run import run_case

ALL_ROWS = expert_matrix()
LARGE = [row for row in ALL_ROWS if row.ranks == 8]
IS_FULL = bool(os.environ.get("INTERNLM_FULL_MATRIX"))
ROWS = ALL_ROWS if IS_FULL else [row for row in ALL_ROWS if row not in LARGE or row in LARGE[::3]]
RESUMED = ROWS if IS_FULL else ROWS[4::12]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_layout_trains_as_one_process_does(row: Combination, ranks: Ranks) -> None:
    """Loss, gradient norm, every gradient, every weight, and what routers count, of every step."""
    verdict = verdict_of(str(row), ranks)
    assert verdict.is_equal, verdict.explain()


@pytest.mark.parametrize("row", RESUMED, ids=str)
def test_it_is_left_and_taken_up_again(row: Combination, ranks: Ranks, tmp_path: Path) -> None:
    """By itself, bit for bit; by one process; and from a checkpoint of one process."""
    found = run_row(row, ranks, tmp_path)
    assert found.straight.is_equal, found.straight.explain()
    assert not any(found.resumed), found.resumed
    assert found.loaded == []
    assert found.from_one_process.is_equal, found.from_one_process.explain()


EXPERTS = "model:family=QWEN2MOE,experts=4,shared_experts=1"


@pytest.mark.parametrize(
    "line",
    [
        "ranks=4 layout:expert=4 stepping:offload,overlap_grad",
        "ranks=4 layout:tensor=2,mode=msp,expert=2,expert_tensor,expert_zero=1 stepping:offload",
        "ranks=2 layout:fsdp stepping:offload",
        "ranks=4 layout:tensor=2,mode=isp,weight=2,pipeline=2,expert_weight=2 stepping:offload,overlap_param",
        "ranks=4 layout:expert=2 stepping:grad_bf16,moments_bf16",
    ],
)
def test_layouts_in_fp32(line: str, ranks: Ranks) -> None:
    """What float64 leaves out."""
    assert_equal_to_one_process(f"{line} {EXPERTS}", ranks)


@pytest.mark.parametrize(
    "layout", ["expert=2", "expert=2,pipeline=2", "mode=isp,weight=2,expert_weight=2", "fsdp", "zero=1"]
)
def test_layouts_in_bf16_that_round_as_one_process_does(layout: str, ranks: Ranks) -> None:
    """Their first step: later ones may choose another expert."""
    world = 2 * Combination.parse(f"ranks=1 layout:{layout}").layout.pipeline
    assert_equal_to_one_process(f"ranks={world} layout:{layout} {EXPERTS},dtype=bfloat16", ranks, steps=1)


@pytest.mark.parametrize(
    "layout", ["expert=2", "tensor=2,mode=mtp,expert=2", "tensor=2,mode=isp,expert_weight=2", "fsdp"]
)
def test_many_micro_batches(layout: str, ranks: Ranks) -> None:
    line = f"ranks=2 layout:{layout} {EXPERTS},dtype=float64 stepping:micro_batches=12 documents:masked=micro_batches"
    assert_equal_to_one_process(line, ranks)


@pytest.mark.parametrize("layout", ["expert=4", "tensor=2,mode=mtp,expert=4", "tensor=2,mode=fsp,expert_tensor"])
def test_no_token_has_a_label(layout: str, ranks: Ranks) -> None:
    """The losses of routers are all that there is."""
    assert_equal_to_one_process(f"ranks=4 layout:{layout} {EXPERTS},dtype=float64 documents:masked=all", ranks)


# -- what the comparison finds ---------------------------------------------------------------------------------------


def verdict_with(function: Any, line: str, ranks: Ranks) -> Verdict:
    """A layout with a defect on its ranks, against one process without it."""
    case = Combination.parse(f"{line} {EXPERTS},dtype=float64").case()
    return judge(case, join_ranks(ranks(case.world_size).run(function, case)), reference_of(case, ranks))


def with_counts_of_a_rank(case: Case) -> RankRecord:
    """Each rank balances by the counts of its own tokens."""
    right = layers._sum
    layers._sum = lambda counts, group: counts * 2
    try:
        return run_case(case, 2)
    finally:
        layers._sum = right


def with_losses_of_ranks_averaged(case: Case) -> RankRecord:
    """The losses of routers are divided by the number of data ranks once too often."""
    right = router.Router.begin_step

    def begin_step(
        self: router.Router, losses: router.RouterLosses, sample_weight: torch.Tensor, seed: int = 0
    ) -> None:
        right(self, losses, sample_weight / 2, seed)

    router.Router.begin_step = begin_step  # type: ignore[method-assign]
    try:
        return run_case(case, 2)
    finally:
        router.Router.begin_step = right  # type: ignore[method-assign]


def with_metrics_of_a_part(case: Case) -> RankRecord:
    """Metrics are summed over data ranks, not over those that share a sample."""
    right = routing_statistics.RoutingStatistics.finish_step

    def finish_step(self: Any, skipped: torch.Tensor) -> dict[str, torch.Tensor]:
        self._axes = [axis for axis in self._axes if axis != self._parallel.routing_axis]
        values = right(self, skipped)
        # Ranks agree, on a wrong number.
        for value in values.values():
            torch.distributed.broadcast(value, 0)
        return values

    routing_statistics.RoutingStatistics.finish_step = finish_step  # type: ignore[method-assign]
    try:
        return run_case(case, 2)
    finally:
        routing_statistics.RoutingStatistics.finish_step = right  # type: ignore[method-assign]


def test_a_balance_loss_of_each_rank_is_found(ranks: Ranks) -> None:
    verdict = verdict_with(with_counts_of_a_rank, "ranks=2 layout:tensor=2,mode=msp", ranks)
    assert any(difference.what == "moe/balance_loss" for difference in verdict.differences)
    assert any("router" in difference.what and difference.step == 1 for difference in verdict.differences)


def test_averaged_losses_are_found(ranks: Ranks) -> None:
    verdict = verdict_with(with_losses_of_ranks_averaged, "ranks=2", ranks)
    first = [difference for difference in verdict.differences if difference.step == 1]
    assert any("gradient of layers.0.feed_forward.router.weight" in difference.what for difference in first)


def test_metrics_of_a_part_of_the_tokens_are_found(ranks: Ranks) -> None:
    verdict = verdict_with(with_metrics_of_a_part, "ranks=2 layout:tensor=2,mode=isp", ranks)
    assert {"moe/balance_loss", "moe/z_loss"} <= {difference.what for difference in verdict.differences}
    assert all(difference.what.startswith("moe/") for difference in verdict.differences)


def test_the_gradient_of_a_router_has_both_losses(ranks: Ranks) -> None:
    case = Combination.parse(f"ranks=1 {EXPERTS},dtype=float64").case()
    for key in ("loss.moe_loss_coeff", "loss.moe_z_loss_coeff"):
        without = Case(changed(case.config, {key: 0.0}))
        verdict = judge(case, record_of(without, ranks), reference_of(case, ranks))
        amounts = {difference.what: difference.amount for difference in verdict.differences if difference.step == 1}
        assert amounts["gradient of layers.0.feed_forward.router.weight"] > 1e-2, key
