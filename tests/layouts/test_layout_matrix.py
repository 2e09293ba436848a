"""Every two options of the matrix meet in a layout that is compared with one process.

`INTERNLM_FULL_MATRIX=1` compares every layout instead, which takes an hour.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from helpers.layouts import assert_equal_to_one_process
from helpers.ranks import RankPool

from internlm.verify.matrix import full_matrix, pairwise_matrix

COMBINATIONS = full_matrix() if os.environ.get("INTERNLM_FULL_MATRIX") else pairwise_matrix()


@pytest.mark.parametrize("text", [str(combination) for combination in COMBINATIONS])
def test_a_layout_trains_as_one_process_does(text: str, ranks: Callable[[int], RankPool]) -> None:
    assert_equal_to_one_process(text, ranks)
