"""Models that read pictures with compiled layers, in layouts, against one process that compiles nothing."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers.layouts import STEPS, reference_of
from helpers.resume import Ranks
from torch._dynamo.testing import CompileCounterWithBackend

from internlm.initialize import stages
from internlm.verify.case import Case, Combination, changed
from internlm.verify.record import RankRecord, join_ranks
from internlm.verify.report import judge
from internlm.verify.run import run_case

pytest.importorskip("transformers")


def compiled_run(case: Case) -> tuple[RankRecord, int]:
    """(what this rank computes, how many graphs it compiled)."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    original = stages.compile_layers
    stages.compile_layers = partial(original, backend=counter)  # type: ignore[assignment, arg-type]
    try:
        return run_case(case, STEPS), counter.frame_count
    finally:
        stages.compile_layers = original


@pytest.mark.parametrize(("layout", "groups"), [("tensor=2,mode=msp", "tower"), ("pipeline=2", "none")])
def test_compiled_layers_behind_a_vision_tower(layout: str, groups: str, ranks: Ranks) -> None:
    line = f"ranks=2 layout:{layout} model:family=LLAVA,dtype=float64,checkpoint=0.5 stepping:groups={groups}"
    case = Combination.parse(line).case()
    compiled = replace(case, config=changed(case.config, {"model.compile": True}))
    records, graphs = zip(*ranks(2).run(compiled_run, compiled), strict=True)
    assert min(graphs) > 0
    verdict = judge(compiled, join_ranks(records), reference_of(case, ranks))
    assert verdict.is_equal, verdict.explain()
