"""Parameter groups in layouts that the matrix leaves out: every pipeline schedule, tied weights, isp, ZeRO groups."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from helpers.layouts import assert_equal_to_one_process
from helpers.ranks import RankPool

ROWS = [
    "ranks=2 layout:pipeline=2,schedule=DUALPIPEV stepping:groups=frozen_layer,overlap_param",
    "ranks=4 layout:pipeline=2,schedule=DUALPIPEV model:tied=true stepping:groups=frozen_ends,overlap_grad",
    "ranks=2 layout:pipeline=2,schedule=ZBV model:tied=true stepping:groups=frozen_ends",
    "ranks=2 layout:pipeline=2,schedule=ZBH1 stepping:groups=factors,overlap_grad",
    "ranks=2 layout:pipeline=2,chunks=2 stepping:groups=frozen_layer,overlap_grad",
    "ranks=2 layout:pipeline=2,chunks=2 model:tied=true stepping:groups=frozen_ends,overlap_grad,overlap_param",
    "ranks=8 layout:tensor=2,mode=mtp,zero=2 model:kv_heads=1 stepping:groups=frozen_layer",
    "ranks=2 layout:mode=isp,weight=2,overlap=true stepping:groups=frozen_layer",
    "ranks=2 layout:tensor=2,mode=isp stepping:groups=frozen_ends",
    "ranks=2 layout:tensor=2,mode=isp,weight=2,overlap=true model:checkpoint=1 stepping:groups=frozen_layer",
]


@pytest.mark.parametrize("row", ROWS)
def test_groups_train_as_in_one_process(row: str, ranks: Callable[[int], RankPool]) -> None:
    assert_equal_to_one_process(row, ranks, steps=3)
