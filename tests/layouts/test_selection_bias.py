"""Selection biases of routers: which steps change them and by what, in every layout to the last bit."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest
from helpers.layouts import record_of, reference_of
from helpers.resume import Ranks
from torch import Tensor

from internlm.model.moe import router
from internlm.verify.case import BIAS_RULE, Case, Combination, changed
from internlm.verify.record import RankRecord, Record, join_ranks
from internlm.verify.run import run_case

MODEL = "model:family=QWEN3MOE,experts=8,top_k=3,router=sigmoid_grouped,dtype=float64"
STEPS = 3


def biases_of(record: Record) -> list[dict[str, list[float]]]:
    """Of each step, by name."""
    return [
        {name: weight.tolist() for name, weight in step.weights.items() if name.endswith("selection_bias")}
        for step in record.steps
    ]


@pytest.mark.parametrize(
    "line",
    [
        f"ranks=4 layout:tensor=2,mode=mtp,expert=4 {MODEL}",
        f"ranks=4 layout:tensor=2,mode=isp,weight=2,overlap,expert=2 {MODEL},checkpoint=1",
        f"ranks=2 layout:fsdp {MODEL}",
        f"ranks=4 layout:pipeline=2,schedule=DUALPIPEV,expert=2 {MODEL},checkpoint=0.5,save_policy=attention",
    ],
)
def test_biases_are_bit_equal_in_every_layout(line: str, ranks: Ranks) -> None:
    case = Combination.parse(line).case()
    found, expected = biases_of(record_of(case, ranks, STEPS)), biases_of(reference_of(case, ranks, STEPS))
    assert found == expected
    assert len({str(step) for step in expected}) > 1


def run_and_count(case: Case) -> tuple[RankRecord, list[dict[int, list[int]]]]:
    """A run in one process, and for each step and layer the experts of all of its tokens."""
    steps: list[dict[int, list[int]]] = []
    right, right_forward = router.choose_experts, router.Router.forward
    layer = -1

    def forward(self: Any, *args: Any) -> Any:
        nonlocal layer
        layer = self.layer
        return right_forward(self, *args)

    def choose(scores: Tensor, form: Any, bias: Any) -> Tensor:
        experts = right(scores, form, bias)
        steps[-1][layer] += experts.flatten().tolist()
        return experts

    def begin_step(*args: Any) -> Any:
        if args[0].layer == 0:
            steps.append(defaultdict(list))
        return right_begin(*args)

    right_begin = router.Router.begin_step
    router.choose_experts, router.Router.forward = choose, forward  # type: ignore[assignment, method-assign]
    router.Router.begin_step = begin_step  # type: ignore[assignment, method-assign]
    try:
        return run_case(case, STEPS), steps
    finally:
        router.choose_experts, router.Router.forward = right, right_forward  # type: ignore[method-assign]
        router.Router.begin_step = right_begin  # type: ignore[method-assign]


def test_biases_follow_the_rule(ranks: Ranks) -> None:
    """The counts of all micro-batches of a step, with recomputation, in a loop over experts."""
    case = Combination.parse(f"ranks=1 {MODEL},checkpoint=1 stepping:micro_batches=3").case()
    (record, steps), *_ = ranks(1).run(run_and_count, case)
    rate = BIAS_RULE["loss.moe_bias_update_rate"]
    bias = {layer: np.zeros(8) for layer in (0, 1)}
    for step, chosen in zip(biases_of(join_ranks([record])), steps, strict=True):
        for layer, experts in chosen.items():
            counts = np.bincount(experts, minlength=8)
            assert counts.sum() == 3 * case.config.data.packed_length * 3
            signs = np.sign(counts.mean() - counts)
            bias[layer] = bias[layer] + rate * (signs - signs.mean())
            found = step[f"layers.{layer}.feed_forward.router.selection_bias"]
            np.testing.assert_allclose(found, bias[layer], rtol=1e-6, atol=1e-9)


def test_no_rate_and_frozen_biases_change_nothing(ranks: Ranks) -> None:
    case = Combination.parse(f"ranks=1 {MODEL}").case()
    still = Case(changed(case.config, {"loss.moe_bias_update_rate": 0.0}))
    assert not any(any(bias) for step in biases_of(record_of(still, ranks)) for bias in step.values())
    groups = {"optimizer.groups": [{"match": "layers.0.*", "freeze": True}]}
    first, second = (f"layers.{layer}.feed_forward.router.selection_bias" for layer in range(2))
    # All steps, as a bias may be back at 0 after the last one.
    trained, frozen = (biases_of(record_of(Case(changed(case.config, keys)), ranks)) for keys in ({}, groups))
    assert any(any(step[first]) for step in trained)
    assert not any(any(step[first]) for step in frozen)
    assert any(frozen[-1][second])
