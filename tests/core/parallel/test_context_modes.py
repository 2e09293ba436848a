"""Training on context ranks, in every mode, against one process: losses, gradients, weights, and routers.

Losses, biases and metrics of routers depend on all tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from helpers.layouts import reference_of
from helpers.ranks import RankPool

from internlm.core.context.parallel_context import ParallelContext
from internlm.core.context.random import seed_everything
from internlm.initialize.build import build_layout
from internlm.verify.case import Case, Combination
from internlm.verify.record import RankRecord, join_ranks
from internlm.verify.report import judge
from internlm.verify.run import CaseRun

MODELS = {
    "dense": "model:family=QWEN2,dtype=float64 documents:masked=uneven",
    "rows": "model:family=INTERNLM2,dtype=float64 documents:packed=false,ragged=true,masked=uneven",
    "experts": "model:family=QWEN3MOE,experts=4,router=sigmoid_grouped,dtype=float64 documents:ragged=true",
}


def run_on_context_ranks(case: Case, size: int, head_first: bool) -> RankRecord:
    """A case, each rank of which is a group of `size` context ranks."""
    seed_everything(case.config.seed)
    layout = build_layout(case.config, case.world_size)
    layout = replace(layout, world_size=layout.world_size * size, context=size, head_first=head_first)
    context = ParallelContext.create(layout)
    run = CaseRun(case, context)
    run.train(2)
    context.close()
    return run.record


@pytest.mark.parametrize(
    ("layout", "size", "head_first"),
    [
        ("ranks=1", 2, True),
        ("ranks=1", 4, True),
        ("ranks=2", 2, True),
        ("ranks=2 layout:fsdp", 2, True),
        ("ranks=2 layout:tensor=2,mode=mtp", 2, True),
        ("ranks=2 layout:tensor=2,mode=msp", 2, True),
        ("ranks=2 layout:tensor=2,mode=fsp,fsdp", 2, True),
        ("ranks=2 layout:pipeline=2", 2, True),
        ("ranks=2 layout:tensor=2,mode=isp,weight=2", 2, True),
        ("ranks=2 layout:tensor=2,mode=isp,weight=2", 2, False),
    ],
)
@pytest.mark.parametrize("model", MODELS)
def test_tokens_of_a_sample_on_several_context_ranks(
    layout: str, size: int, head_first: bool, model: str, ranks: Callable[[int], RankPool]
) -> None:
    if model == "experts" and "fsdp" in layout:
        pytest.skip("experts are sharded as other weights are")
    case = Combination.parse(f"{layout} {MODELS[model]}").case()
    world = case.world_size * size
    found = join_ranks(ranks(world).run(run_on_context_ranks, case, size, head_first))
    verdict = judge(case, found, reference_of(case, ranks))
    assert verdict.is_equal, verdict.explain()
