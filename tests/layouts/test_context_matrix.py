"""Samples that are dealt to context ranks: every two options of the matrix meet in a layout that trains as one process.

Loss, gradient norm, every gradient and every weight of every step. A run of the tests takes a quarter of the rows, in
which every option occurs; `INTERNLM_FULL_MATRIX=1` takes all of them, and leaves and takes up each one.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.layouts import assert_equal_to_one_process, record_of, reference_of, settings, verdict_of
from helpers.resume import Ranks, run_row

from internlm.verify.case import Combination, changed
from internlm.verify.matrix import CONTEXT, context_matrix
from internlm.verify.report import judge

IS_FULL = bool(os.environ.get("INTERNLM_FULL_MATRIX"))
COMBINATIONS = context_matrix()
TRAINED = COMBINATIONS if IS_FULL else COMBINATIONS[::4]
RESUMED = COMBINATIONS if IS_FULL else COMBINATIONS[1::24]


@pytest.mark.parametrize("combination", TRAINED, ids=str)
def test_a_layout_with_context_ranks_trains_as_one_process_does(combination: Combination, ranks: Ranks) -> None:
    verdict = verdict_of(str(combination), ranks)
    assert verdict.is_equal, verdict.explain()


@pytest.mark.parametrize("option", [option for axis in CONTEXT.axes.values() for option in axis])
def test_every_option_is_trained(option: str) -> None:
    assert any(settings(option) <= settings(str(row)) for row in TRAINED)


@pytest.mark.parametrize("combination", RESUMED, ids=str)
def test_a_layout_with_context_ranks_is_left_and_taken_up_again(
    combination: Combination, ranks: Ranks, tmp_path: Path
) -> None:
    """Bit for bit in the same layout; from and to one process with the same weights, masters and moments."""
    row = run_row(combination, ranks, tmp_path)
    assert row.straight.is_equal, row.straight.explain()
    assert not any(row.resumed), row.resumed
    assert row.loaded == []
    assert row.from_one_process.is_equal, row.from_one_process.explain()


@pytest.mark.parametrize("context", ["context=2,context_exchange=ring", "context=4,context_cut=document_zigzag"])
@pytest.mark.parametrize("model", ["model:heads=4,kv_heads=1,window=true", "model:family=QWEN3,kv_heads=2"])
def test_context_ranks_in_float64(context: str, model: str, ranks: Ranks) -> None:
    """Where rounding explains 1e-12, every order of sums is seen to be only that."""
    size = int(context[8])
    assert_equal_to_one_process(f"ranks={size} layout:{context} {model},dtype=float64", ranks)


def test_frequencies_depend_on_the_length_of_the_whole_document(ranks: Ranks) -> None:
    """With dynamic NTK, a rank that has a part of a document rotates by the length of all of it."""
    case = Combination.parse("ranks=2 layout:context=2,context_cut=zigzag model:dtype=float64").case()
    scaling = {"model.rope_scaling": {"type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 4}}
    case = replace(case, config=changed(case.config, scaling))
    verdict = judge(case, record_of(case, ranks), reference_of(case, ranks))
    assert verdict.is_equal, verdict.explain()
