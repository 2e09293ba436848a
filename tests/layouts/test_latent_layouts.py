"""What of latent attention is split over ranks; the matrix of experts has it in every layout."""

from __future__ import annotations

import pytest
from helpers.layouts import assert_equal_to_one_process, reference_of
from helpers.resume import Ranks

from internlm.core.parallel.modes import mtp
from internlm.verify.case import Case, Combination
from internlm.verify.record import InconsistentRanksError, RankRecord, join_ranks
from internlm.verify.report import judge
from internlm.verify.run import run_case


@pytest.mark.parametrize(
    "line",
    [
        "ranks=4 layout:tensor=4,mode=msp model:family=DEEPSEEK_V2,dtype=float64",
        "ranks=4 layout:tensor=4,mode=isp,weight=2 model:family=DEEPSEEK_V2,dtype=float64",
        "ranks=2 layout:tensor=2,mode=mtp model:family=DEEPSEEK_V2,dtype=float64,float8",
        "ranks=2 layout:tensor=2,mode=msp model:family=DEEPSEEK_V2,dtype=float64,float8,q_latent=false",
        "ranks=2 layout:fsdp model:family=DEEPSEEK_V2,dtype=bfloat16,fp32_norm,fp32_residual",
        # Latent vectors are gathered over context ranks.
        "ranks=2 layout:context=2,context_cut=contiguous model:family=DEEPSEEK_V2,dtype=float64,checkpoint=1",
        "ranks=4 layout:context=4,context_exchange=ring,mode=isp,weight=4 model:family=DEEPSEEK_V2,dtype=float64",
        "ranks=4 layout:context=2,tensor=2,mode=mtp model:family=DEEPSEEK_V2,dtype=float64,q_latent=false,checkpoint=1",
        "ranks=4 layout:context=2,tensor=2,mode=msp,context_cut=zigzag model:family=DEEPSEEK_V2,dtype=float64",
        "ranks=4 layout:context=2,tensor=2,mode=fsp model:family=DEEPSEEK_V2,dtype=float64,q_latent=false,checkpoint=1 "
        "documents:packed=false",
        "ranks=4 layout:context=2,fsdp model:family=DEEPSEEK_V2,dtype=bfloat16,fp32_norm",
        "ranks=4 layout:context=2,pipeline=2,schedule=ZBH1 model:family=DEEPSEEK_V2,dtype=float64",
        "ranks=4 layout:context=2,context_cut=document_zigzag,expert=2 "
        "model:family=DEEPSEEK_V3,dtype=float64,experts=8,router=sigmoid_grouped,dense_layers=1,multi_token=1",
        # 3 ranks do not divide the tokens of a sample.
        "ranks=3 layout:context=3 model:family=DEEPSEEK_V3,dtype=float64,experts=4,q_latent=false",
        # Keys and values of all heads travel.
        "ranks=4 layout:context=2,tensor=2,mode=isp,weight=2 model:family=DEEPSEEK_V2,dtype=float64,checkpoint=1",
    ],
)
def test_layouts_that_the_matrix_leaves_out(line: str, ranks: Ranks) -> None:
    assert_equal_to_one_process(line, ranks)


def without_gradients_of_other_heads(case: Case) -> RankRecord:
    """The rotary key gets the gradient of the heads of one rank."""
    right = mtp.Mtp.share_key

    mtp.Mtp.share_key = lambda self: None  # type: ignore[method-assign]
    try:
        return run_case(case, 1)
    finally:
        mtp.Mtp.share_key = right  # type: ignore[method-assign]


def test_a_partial_gradient_of_the_rotary_key_is_found(ranks: Ranks) -> None:
    """The latent rows of wkv_a, whose gradient column layers sum, are right; the others are not."""
    case = Combination.parse("ranks=2 layout:tensor=2,mode=mtp model:family=DEEPSEEK_V2,dtype=float64").case()
    records = ranks(2).run(without_gradients_of_other_heads, case)
    # Each rank has another gradient of a weight that is replicated.
    with pytest.raises(InconsistentRanksError, match="wkv_a"):
        judge(case, join_ranks(records), reference_of(case, ranks, 1))
