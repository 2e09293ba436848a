"""Training on context ranks, in every mode, against one process: losses, gradients, weights, and routers.

Losses, biases and metrics of routers depend on all tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from helpers.layouts import record_of, reference_of
from helpers.ranks import RankPool

from internlm.verify.case import Combination, changed
from internlm.verify.report import judge

MODELS = {
    "dense": "model:family=QWEN2,dtype=float64 documents:masked=uneven",
    "rows": "model:family=INTERNLM2,dtype=float64 documents:packed=false,ragged=true,masked=uneven",
    "experts": "model:family=QWEN3MOE,experts=4,router=sigmoid_grouped,dtype=float64 documents:ragged=true",
}


def context(size: int) -> dict[str, Any]:
    return {"parallel.context.size": size}


def two(head_first: bool) -> dict[str, Any]:
    """2 head ranks times 2 context ranks."""
    return {
        "parallel.tensor.size": 4,
        "parallel.sequence_2D": {
            "enable": True,
            "head_size": 2,
            "context_size": 2,
            "device_placement_strategy": {"head_first": head_first},
        },
    }


@pytest.mark.parametrize(
    ("layout", "keys", "size"),
    [
        ("ranks=1", context(2), 2),
        ("ranks=1", {**context(4), "parallel.context.window_size": 2}, 4),
        ("ranks=2", context(2), 2),
        ("ranks=2 layout:fsdp", context(2), 2),
        ("ranks=2 layout:tensor=2,mode=mtp", context(2), 2),
        ("ranks=2 layout:tensor=2,mode=msp", context(2), 2),
        ("ranks=2 layout:tensor=2,mode=fsp,fsdp", context(2), 2),
        ("ranks=2 layout:pipeline=2", context(2), 2),
        ("ranks=2 layout:tensor=2,mode=isp,weight=2", two(head_first=True), 2),
        ("ranks=2 layout:tensor=2,mode=isp,weight=2", two(head_first=False), 2),
    ],
)
@pytest.mark.parametrize("model", MODELS)
def test_tokens_of_a_sample_on_several_context_ranks(
    layout: str, keys: dict[str, Any], size: int, model: str, ranks: Callable[[int], RankPool]
) -> None:
    if model == "experts" and "fsdp" in layout:
        pytest.skip("experts are sharded as other weights are")
    case = Combination.parse(f"{layout} {MODELS[model]}").case()
    split = replace(case, config=changed(case.config, keys), world_size=case.world_size * size)
    verdict = judge(split, record_of(split, ranks), reference_of(case, ranks))
    assert verdict.is_equal, verdict.explain()
