"""Every row of the matrix of layouts can be left and taken up again, by itself and by others.

A row's own checkpoint is loaded by one process, and the one of one process by the row. Both are exact, so any layout
loads what any other has saved.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.resume import (
    SAVED_STEP,
    Ranks,
    differences,
    leave_and_resume,
    loaded_in_one_process,
    one_process,
    since_the_save,
)

from internlm.verify.case import Combination
from internlm.verify.compare import compare, tolerance_of
from internlm.verify.matrix import pairwise_matrix
from internlm.verify.record import assemble, join


@pytest.mark.parametrize("text", [str(combination) for combination in pairwise_matrix()])
def test_a_run_goes_on_as_if_it_had_not_stopped(text: str, ranks: Ranks, tmp_path: Path) -> None:
    case = Combination.parse(text).case()
    reference = case.reference()
    alone, row = str(tmp_path / "alone"), str(tmp_path / "row")
    (expected,) = ranks(1).run(one_process, reference, alone)
    results = ranks(case.world_size).run(leave_and_resume, case, row, f"{alone}/{SAVED_STEP}")

    # In the same layout: bit for bit.
    assert [result.differences for result in results] == [[]] * case.world_size

    # What the row saved, in one process: the same bits.
    (loaded,) = ranks(1).run(loaded_in_one_process, reference, f"{row}/{SAVED_STEP}")
    saved = join([result.saved for result in results], "saved", {})
    assert differences(join([loaded], "loaded", {}), saved) == []

    # What one process saved, in the row: the same weights, and steps within rounding.
    found = compare(
        assemble([result.from_one_process for result in results]),
        since_the_save(assemble([expected])),
        tolerance_of(case),
    )
    assert not found, f"{text}\n" + "\n".join(map(str, found[:4]))
