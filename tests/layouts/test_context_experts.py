"""Mixtures of experts on context ranks: what depends on all tokens of a sample, or on their order."""

from __future__ import annotations

import dataclasses

import pytest
from helpers.layouts import assert_equal_to_one_process, reference_of
from helpers.resume import Ranks

from internlm.core.routing_statistics import RoutingStatistics
from internlm.verify.case import Case, Combination
from internlm.verify.record import RankRecord, join_ranks
from internlm.verify.report import judge
from internlm.verify.run import run_case

ISP = "ranks=4 layout:context=2,tensor=2,mode=isp"
MTP = "ranks=4 layout:context=2,tensor=2,mode=mtp"
MSP = "ranks=4 layout:context=2,tensor=2,mode=msp"
EXPERTS = "model:family=QWEN3MOE,experts=8,dtype=float64"


@pytest.mark.parametrize(
    "line",
    [
        f"{ISP},context_cut=contiguous {EXPERTS},top_k=3,selection=first,router=sigmoid_grouped",
        f"{ISP},context_cut=zigzag,weight=2,expert=2 {EXPERTS},top_k=1,selection=gshard_random documents:packed=false",
        f"{MTP},context_cut=document_zigzag,expert=2 {EXPERTS},selection=largest,router=sigmoid_grouped,checkpoint=1",
        f"{MTP},context_cut=zigzag {EXPERTS},selection=gshard_random documents:packed=false",
        f"{MTP},context_cut=zigzag,expert_tensor {EXPERTS},selection=first,checkpoint=1",
        f"{MSP},context_cut=zigzag,expert=4 {EXPERTS},top_k=3,selection=gshard,router=sigmoid_grouped",
        f"{MSP},context_cut=document_zigzag {EXPERTS},top_k=1,selection=gshard_random,checkpoint=1",
        f"ranks=2 layout:context=2,pipeline=1,context_cut=zigzag,expert=2 {EXPERTS},selection=largest,checkpoint=1",
        f"ranks=4 layout:context=2,pipeline=2,schedule=ZBV {EXPERTS},selection=gshard,router=sigmoid_grouped",
        f"ranks=4 layout:context=4,context_cut=document_zigzag {EXPERTS},selection=first,router=sigmoid_grouped",
        # Attention sinks, and a window in every second layer.
        "ranks=2 layout:context=2,context_cut=zigzag "
        "model:family=GPT_OSS,experts=4,kv_heads=2,dtype=float64,checkpoint=1",
        # The ranks do not divide the 32 tokens of a sample, which gets a document of padding.
        f"ranks=3 layout:context=3,context_cut=zigzag {EXPERTS},selection=first,router=sigmoid_grouped",
        f"ranks=3 layout:context=3 {EXPERTS},selection=gshard_random documents:packed=false",
    ],
)
def test_samples_on_context_ranks_are_those_of_one_process(line: str, ranks: Ranks) -> None:
    assert_equal_to_one_process(line, ranks)


def run_in_order_of_ranks(case: Case) -> RankRecord:
    """A run whose routers take the tokens of a rank for consecutive ones of the sample."""
    right = RoutingStatistics._sample_tokens

    def without_positions(self, micro):  # type: ignore[no-untyped-def]
        return dataclasses.replace(right(self, micro), positions=None)

    RoutingStatistics._sample_tokens = without_positions  # type: ignore[method-assign]
    try:
        return run_case(case, 1)
    finally:
        RoutingStatistics._sample_tokens = right  # type: ignore[method-assign]


@pytest.mark.parametrize("selection", ["first", "gshard_random", "largest"])
def test_tokens_in_another_order_are_found(selection: str, ranks: Ranks) -> None:
    """Capacity by position, capacity with noise, and jitter."""
    line = f"ranks=2 layout:context=2,context_cut=zigzag {EXPERTS},selection={selection}"
    case = Combination.parse(line).case()
    found = join_ranks(ranks(2).run(run_in_order_of_ranks, case))
    assert not judge(case, found, reference_of(case, ranks, 1)).is_equal
