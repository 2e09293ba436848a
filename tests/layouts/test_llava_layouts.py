"""Models that read pictures: every two options of the matrix meet in a layout that trains as one process does.

Loss, gradient norm, every gradient and every weight of every step, with steps in which a rank, or every rank, has no
picture. A run of the tests takes a few rows of 2 and 4 ranks, in which every option occurs, and those with context
ranks; `INTERNLM_FULL_MATRIX=1` takes all, and leaves and takes up each one.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from helpers.layouts import assert_equal_to_one_process, reference_of, settings
from helpers.resume import Ranks, run_row

from internlm.verify.case import Combination
from internlm.verify.matrix import VISION, vision_matrix

IS_FULL = bool(os.environ.get("INTERNLM_FULL_MATRIX"))
OPTIONS = [option for axis in VISION.axes.values() for option in axis]
ROWS = vision_matrix()


def small_rows() -> list[Combination]:
    """The rows of 2 and 4 ranks that have context ranks, or an option which no row before them has."""
    missing, rows = set(OPTIONS), []
    for row in ROWS:
        found = {option for option in missing if settings(option) <= settings(str(row))}
        if row.ranks in (2, 4) and (found or row.layout.context > 1):
            rows.append(row)
            missing -= found
    return rows


TRAINED = ROWS if IS_FULL else small_rows()
RESUMED = ROWS if IS_FULL else TRAINED[1::8]


@pytest.mark.parametrize("combination", TRAINED, ids=str)
def test_a_model_that_reads_pictures_trains_as_one_process_does(combination: Combination, ranks: Ranks) -> None:
    assert_equal_to_one_process(str(combination), ranks)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_is_trained(option: str) -> None:
    assert any(settings(option) <= settings(str(row)) for row in TRAINED)


@pytest.mark.parametrize("combination", RESUMED, ids=str)
def test_it_is_left_and_taken_up_again(combination: Combination, ranks: Ranks, tmp_path: Path) -> None:
    """Bit for bit in the same layout; from and to one process with the same weights, masters and moments."""
    row = run_row(combination, ranks, tmp_path)
    assert row.straight.is_equal, row.straight.explain()
    assert not any(row.resumed), row.resumed
    assert row.loaded == []
    assert row.from_one_process.is_equal, row.from_one_process.explain()


@pytest.mark.parametrize("groups", ["none", "tower", "projector"])
def test_only_what_is_not_frozen_changes(groups: str, ranks: Ranks) -> None:
    """A tower is frozen unless a group names it. What lies behind the selected hidden state is never trained."""
    record = reference_of(Combination.parse(f"ranks=1 model:family=LLAVA stepping:groups={groups}").case(), ranks)
    last = record.steps[-1]
    changed = {name for name, values in last.weights.items() if not np.array_equal(values, record.initial[name])}
    assert changed == last.gradients.keys()
    parts = {name.partition(".")[0] for name in changed}
    decoder = set() if groups == "projector" else {"tok_embeddings", "layers", "norm", "output"}
    assert parts == decoder | {"vision_proj"} | ({"vision_tower"} if groups == "tower" else set())
    assert not any(name.startswith("vision_tower.encoder.layers.1.") for name in changed)
