"""Layouts that multiply in float8 train as one process does that multiplies so; in float64, see `FLOAT8_KEYS`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.layouts import STEPS, record_of, reference_of, verdict_of
from helpers.resume import Ranks, run_row
from torch import Tensor

from internlm.initialize.stages import build_chunks
from internlm.model.modules.linear import Float8Linear
from internlm.model.ops.float8 import kernels
from internlm.model.ops.float8 import scaled_gemm as float8
from internlm.verify.case import Case, Combination, changed
from internlm.verify.record import join_ranks
from internlm.verify.report import judge
from internlm.verify.run import run_case, start_case

FLOAT8 = "model:dtype=float64,float8"

LINES = (
    "ranks=2",
    "ranks=2 layout:tensor=2,mode=mtp",
    "ranks=2 layout:tensor=2,mode=fsp model:kv_heads=2,family=LLAMA2,bias=true",
    "ranks=2 layout:tensor=2,mode=isp model:kv_heads=1",
    "ranks=2 layout:mode=isp,weight=2,overlap model:checkpoint=1,save_policy=matmuls",
    "ranks=4 layout:tensor=2,mode=isp,weight=2,pipeline=2 model:family=QWEN3",
    "ranks=2 layout:pipeline=2,schedule=ZBH1 stepping:overlap_grad,overlap_param,bucket=1000",
    "ranks=2 layout:pipeline=2,schedule=DUALPIPEV",
    "ranks=2 layout:fsdp documents:masked=ends",
    "ranks=4 layout:tensor=2,mode=msp,fsdp model:checkpoint=1",
    "ranks=4 layout:zero=2 model:family=GEMMA documents:packed=false",
)


@pytest.mark.parametrize("line", LINES)
def test_a_layout_trains_as_one_process_does(line: str, ranks: Ranks) -> None:
    verdict = verdict_of(f"{line} {FLOAT8}", ranks)
    assert verdict.is_equal, verdict.explain()


@pytest.mark.parametrize(
    "line",
    [
        "ranks=2 layout:zero=2,tensor=1,pipeline=1",
        "ranks=4 layout:tensor=2,mode=mtp,fsdp",
        "ranks=2 layout:mode=isp,weight=2",
    ],
)
def test_it_is_left_and_taken_up_again(line: str, ranks: Ranks, tmp_path: Path) -> None:
    """State in float64 is saved as it is."""
    row = run_row(Combination.parse(f"{line} {FLOAT8}"), ranks, tmp_path)
    assert not any(row.resumed) and row.loaded == []
    assert row.from_one_process.is_equal, row.from_one_process.explain()


def test_all_is_in_float64_but_nothing_of_float8_is_left_out() -> None:
    case = Combination.parse(f"ranks=1 {FLOAT8},family=QWEN3").case()
    context = start_case(case)
    (model,) = build_chunks(case.config, context)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    in_float8 = {name for name, module in model.named_modules() if isinstance(module, Float8Linear)}
    matrices = {name.removesuffix(".weight") for name, p in model.named_parameters() if p.dim() == 2}
    assert matrices - in_float8 == {"tok_embeddings", "output"}
    context.close()


def test_the_run_without_float8_is_another_one(ranks: Ranks) -> None:
    case = Combination.parse(f"ranks=1 {FLOAT8}").case()
    without = Case(changed(case.config, {"float8.enable_float8_linear": False}))
    verdict = judge(case, record_of(without, ranks), reference_of(case, ranks))
    assert max(difference.amount for difference in verdict.differences if difference.step == 1) > 1e-2


def with_wrong_weights(case: Case) -> Any:
    """What a rank records when the second one takes the neighbour of the first number of each weight."""
    right = kernels.quantize

    def wrong(tensor: Tensor, scale: Tensor, format: torch.dtype) -> float8.Scaled:
        scaled = right(tensor, scale, format)
        if tensor.dim() == 2 and torch.distributed.get_rank() == 1:
            scaled.values.view(torch.uint8)[0, 0] ^= 1
        return scaled

    kernels.quantize = wrong
    try:
        return run_case(case, STEPS)
    finally:
        kernels.quantize = right


def test_a_single_number_that_is_rounded_to_its_neighbour_is_found(ranks: Ranks) -> None:
    case = Combination.parse(f"ranks=2 layout:tensor=2,mode=mtp {FLOAT8}").case()
    verdict = judge(case, join_ranks(ranks(2).run(with_wrong_weights, case)), reference_of(case, ranks))
    assert not verdict.is_equal and verdict.differences[0].step == 1
