"""Every two options of the matrix meet in a layout that trains as one process does; a third of the layouts, in which
every option occurs, are left and taken up again too.

What a layout saved is loaded by one process, and what one process saved by the layout, both exactly; so any layout of
the matrix loads what any other saved. In every run, that third, and all layouts of up to four ranks; with
`INTERNLM_FULL_MATRIX=1` every layout of the full matrix is left and taken up, which takes hours.
"""

from __future__ import annotations

import os

import pytest
from helpers.layouts import settings, verdict_of
from helpers.resume import Ranks, Row, run_row

from internlm.verify.case import Combination
from internlm.verify.matrix import DENSE, full_matrix, pairwise_matrix

COMBINATIONS = pairwise_matrix()
RESUMED = full_matrix() if os.environ.get("INTERNLM_FULL_MATRIX") else COMBINATIONS[::3]


SMALL = [each for each in COMBINATIONS if each.ranks <= 4 and each not in RESUMED]


@pytest.mark.parametrize("combination", SMALL, ids=str)
def test_a_layout_trains(combination: Combination, ranks: Ranks) -> None:
    """As one process does: loss, gradient norm, every gradient and every weight of every step."""
    verdict = verdict_of(str(combination), ranks)
    assert verdict.is_equal, verdict.explain()


@pytest.mark.parametrize("option", [option for axis in DENSE.axes.values() for option in axis])
def test_every_option_is_left_and_taken_up_again(option: str) -> None:
    assert any(settings(option) <= settings(str(row)) for row in RESUMED)


@pytest.fixture(scope="module", params=RESUMED, ids=str)
def row(request: pytest.FixtureRequest, ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Row:
    """One run of the ranks for all tests of a row."""
    combination: Combination = request.param
    return run_row(combination, ranks, tmp_path_factory.mktemp("row"))


def test_a_layout_trains_as_one_process_does(row: Row) -> None:
    """Loss, gradient norm, every gradient and every weight of every step."""
    assert row.straight.is_equal, row.straight.explain()


def test_it_goes_on_from_its_checkpoint_bit_for_bit(row: Row) -> None:
    """Losses, norms, gradients, weights, masters, moments, loss scale, counters, and the numbers drawn at random."""
    assert not any(row.resumed), row.resumed


def test_one_process_loads_its_checkpoint_bit_for_bit(row: Row) -> None:
    """Weights, masters and moments."""
    assert row.loaded == []


def test_it_goes_on_from_a_checkpoint_of_one_process(row: Row) -> None:
    """From the same bits, and then as that process does."""
    assert row.from_one_process.is_equal, row.from_one_process.explain()
