"""Experts in float8, in every form in which ranks hold them, train as those of one process do; see `FLOAT8_KEYS`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.layouts import STEPS, reference_of, verdict_of
from helpers.resume import Ranks
from torch import Tensor

from internlm.core.parallel.experts.expert_linear import ExpertLinear
from internlm.core.parallel.model_parallel import ModelParallel
from internlm.initialize.stages import build_chunks
from internlm.model.moe.experts import Experts
from internlm.model.ops.float8 import grouped_kernels
from internlm.model.ops.float8 import scaled_gemm as float8
from internlm.verify.case import Case, Combination
from internlm.verify.record import join_ranks
from internlm.verify.report import judge
from internlm.verify.run import run_case, start_case

FLOAT8 = "model:dtype=float64,float8"

LINES = (
    "ranks=2 model:family=QWEN3MOE,experts=4",
    "ranks=4 layout:expert=4 model:family=QWEN3MOE,experts=8,top_k=3,checkpoint=1",
    # Experts without a token.
    "ranks=4 layout:expert=4 model:family=OLMOE,experts=64,kv_heads=1",
    "ranks=2 layout:tensor=2,mode=mtp model:family=MIXTRALMOE,experts=4,shared_experts=2",
    "ranks=2 layout:tensor=2,mode=mtp,expert_tensor model:family=GPT_OSS,experts=4,kv_heads=2",
    "ranks=4 layout:tensor=2,mode=msp,expert=2,expert_tensor model:family=QWEN3MOE,experts=4,checkpoint=1,"
    "save_policy=matmuls",
    "ranks=4 layout:tensor=2,mode=fsp,expert=4 model:family=QWEN2MOE,experts=8,shared_experts=1,dense_layers=1",
    "ranks=2 layout:tensor=2,mode=isp,expert=2 model:family=QWEN3MOE,experts=4",
    "ranks=4 layout:mode=isp,weight=2,expert_weight=4,expert_overlap model:family=QWEN3MOE,experts=4,checkpoint=1",
    "ranks=4 layout:tensor=2,mode=isp,weight=2,expert=2,expert_weight=2 model:family=GLM4_MOE,experts=8,router=sigmoid",
    # Parts of experts: the weights of 3 ranks.
    "ranks=3 layout:mode=isp,expert_weight=3 model:family=QWEN3MOE,experts=4,checkpoint=0.5,save_policy=matmuls",
    "ranks=2 layout:fsdp model:family=QWEN3MOE,experts=4,checkpoint=1 documents:masked=ends",
    "ranks=3 layout:fsdp model:family=QWEN3MOE,experts=4",
    "ranks=4 layout:tensor=2,mode=msp,expert_tensor,fsdp model:family=QWEN3MOE,experts=4",
    "ranks=2 layout:pipeline=2,schedule=ZBH1 model:family=QWEN3MOE,experts=4,selection=gshard",
    "ranks=4 layout:pipeline=2,schedule=DUALPIPEV,expert=2 model:family=DEEPSEEK_V2,experts=4",
)


@pytest.mark.parametrize("line", LINES)
def test_a_layout_trains_as_one_process_does(line: str, ranks: Ranks) -> None:
    case = Combination.parse(f"{line} {FLOAT8}")
    assert case.problems() == []
    verdict = verdict_of(str(case), ranks)
    assert verdict.is_equal, verdict.explain()


def test_no_expert_is_left_out() -> None:
    case = Combination.parse(f"ranks=1 {FLOAT8},family=QWEN3MOE,experts=4").case()
    context = start_case(case)
    (model,) = build_chunks(case.config, context)
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    assert len(experts) == case.config.model.num_layers
    for linear in (linear for own in experts for linear in (own.linear13, own.linear2)):
        assert isinstance(linear, ExpertLinear) and linear.kernels.is_float8
    context.close()


def with_wrong_weights(case: Case) -> Any:
    """What a rank records when the second one takes the neighbour of the first number of each weight."""
    right = grouped_kernels.quantize

    def wrong(tensor: Tensor, scale: Tensor, format: torch.dtype) -> float8.Scaled:
        scaled = right(tensor, scale, format)
        if tensor.dim() == 3 and torch.distributed.get_rank() == 1:
            scaled.values.view(torch.uint8)[0, 0, 0] ^= 1
        return scaled

    grouped_kernels.quantize = wrong
    try:
        return run_case(case, STEPS)
    finally:
        grouped_kernels.quantize = right


def test_a_single_number_that_is_rounded_to_its_neighbour_is_found(ranks: Ranks) -> None:
    line = f"ranks=2 layout:tensor=2,mode=mtp,expert_tensor {FLOAT8},family=QWEN3MOE,experts=4"
    case = Combination.parse(line).case()
    verdict = judge(case, join_ranks(ranks(2).run(with_wrong_weights, case)), reference_of(case, ranks))
    assert not verdict.is_equal and verdict.differences[0].step == 1


def test_experts_without_float8_are_other_ones(ranks: Ranks) -> None:
    case = Combination.parse(f"ranks=1 {FLOAT8},family=QWEN3MOE,experts=4").case()
    verdict = judge(case, join_ranks(ranks(1).run(with_plain_experts, case)), reference_of(case, ranks))
    assert max(difference.amount for difference in verdict.differences if difference.step == 1) > 1e-3


def with_plain_experts(case: Case) -> Any:
    """What a process records whose experts are not in float8."""
    right = ModelParallel.adapt_experts
    ModelParallel.adapt_experts = lambda parallel, name, experts: None  # type: ignore[method-assign]
    try:
        return run_case(case, STEPS)
    finally:
        ModelParallel.adapt_experts = right  # type: ignore[method-assign]
