"""What the matrix of context ranks leaves out: 2D sequence parallelism, and mixtures of experts in every mode.

Losses, biases and metrics of routers depend on all tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from helpers.layouts import assert_equal_to_one_process
from helpers.ranks import RankPool

DENSE = "model:family=QWEN2,kv_heads=2,dtype=float64 documents:masked=uneven"
ROWS = "model:family=INTERNLM2,dtype=float64 documents:packed=false,ragged=true"
EXPERTS = "model:family=QWEN3MOE,experts=4,router=sigmoid_grouped,dtype=float64 documents:ragged=true"


@pytest.mark.parametrize(
    "layout",
    [
        "ranks=4 layout:tensor=2,context=2,context_placement=context_first,weight=2",
        "ranks=4 layout:context=4,context_placement=interleaved,context_window=2,weight=4,overlap",
        "ranks=8 layout:tensor=2,context=2,context_placement=context_first,pipeline=2,zero=2",
    ],
)
@pytest.mark.parametrize("model", [DENSE, ROWS, EXPERTS])
def test_2d_sequence_parallelism(layout: str, model: str, ranks: Callable[[int], RankPool]) -> None:
    assert_equal_to_one_process(f"{layout},mode=isp {model}", ranks)


@pytest.mark.parametrize(
    "layout",
    [
        "ranks=4 layout:context=4",
        "ranks=4 layout:context=2,expert=2",
        "ranks=4 layout:context=2,fsdp",
        "ranks=4 layout:context=2,tensor=2,mode=mtp,expert=4",
        "ranks=4 layout:context=2,tensor=2,mode=msp,expert_tensor",
        "ranks=4 layout:context=2,tensor=2,mode=fsp,expert=2,expert_tensor",
        "ranks=4 layout:context=2,tensor=2,mode=isp,weight=2,expert_weight=4",
    ],
)
def test_experts(layout: str, ranks: Callable[[int], RankPool]) -> None:
    assert_equal_to_one_process(f"{layout} {EXPERTS}", ranks)


@pytest.mark.parametrize(
    "layout",
    [
        "ranks=2 layout:context=2,fsdp",
        "ranks=4 layout:context=2,tensor=2,mode=isp,weight=4",
    ],
)
def test_float8(layout: str, ranks: Callable[[int], RankPool]) -> None:
    assert_equal_to_one_process(f"{layout} model:float8=true,dtype=float64", ranks)
