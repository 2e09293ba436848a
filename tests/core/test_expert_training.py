"""Mixtures of experts that are recomputed, compiled or moved to the host give the numbers of those that are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.ranks import RankPool

from internlm.core.compilation.compile_layers import compile_layers
from internlm.verify.case import Case, Combination, changed
from internlm.verify.record import RankRecord
from internlm.verify.run import CaseRun, run_case, start_case

Ranks = Callable[[int], RankPool]

MODEL = "model:family=QWEN2MOE,experts=4,shared_experts=1"

LAYOUTS = (
    "ranks=1",
    "ranks=2 layout:expert=2",
    "ranks=2 layout:tensor=2,mode=mtp,expert_tensor",
    "ranks=2 layout:tensor=2,mode=isp,weight=2,expert_weight=2,expert_overlap",
    "ranks=2 layout:fsdp",
)


def case_of(text: str, **keys: Any) -> Case:
    case = Combination.parse(text).case()
    return Case(changed(case.config, {name.replace("__", "."): value for name, value in keys.items()}), case.world_size)


def assert_same(found: list[RankRecord], expected: list[RankRecord]) -> None:
    """Every number, bit for bit."""
    for one, other in zip(found, expected, strict=True):
        for step, right in zip(one.steps, other.steps, strict=True):
            assert (step.loss, step.grad_norm, step.routing) == (right.loss, right.grad_norm, right.routing)
            for piece, right_piece in zip(step.gradients + step.weights, right.gradients + right.weights, strict=True):
                assert piece.name == right_piece.name
                assert np.array_equal(piece.values, right_piece.values), piece.name


@pytest.mark.parametrize("policy", ["matmuls", "attention", "nothing"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_recomputation_changes_no_bit_and_counts_once(layout: str, policy: str, ranks: Ranks) -> None:
    plain, recomputed = case_of(f"{layout} {MODEL}"), case_of(f"{layout} {MODEL},checkpoint=1,save_policy={policy}")
    pool = ranks(plain.world_size)
    assert_same(pool.run(run_case, recomputed, 2), pool.run(run_case, plain, 2))


@pytest.mark.parametrize("dtype", ["torch.bfloat16", "torch.float16"])
@pytest.mark.parametrize("layout", ["ranks=1", "ranks=2 layout:expert=2"])
def test_recomputation_in_16_bits(layout: str, dtype: str, ranks: Ranks) -> None:
    """A second choice of experts, of rounded numbers, could be another one."""
    keys = {"model__dtype": dtype}
    plain, recomputed = (case_of(f"{layout} {MODEL},checkpoint={share}", **keys) for share in (0, 1))
    pool = ranks(plain.world_size)
    found, expected = pool.run(run_case, recomputed, 2), pool.run(run_case, plain, 2)
    assert_same(found, expected)
    assert all(np.isfinite(step.grad_norm) for step in expected[0].steps[1:])


def run_compiled(case: Case) -> RankRecord:
    """A run whose layers are compiled, without generating code."""
    torch._dynamo.reset()
    context = start_case(case)
    run = CaseRun(case, context)
    for chunk in run.trainer.engine.chunks:
        compile_layers(chunk, backend="aot_eager")
    run.train(2)
    context.close()
    return run.record


@pytest.mark.parametrize("checkpoint", [0, 1])
@pytest.mark.parametrize(
    "layout", ["ranks=1", "ranks=2 layout:expert=2", "ranks=2 layout:tensor=2,mode=msp,expert_tensor"]
)
def test_compiled_layers(layout: str, checkpoint: int, ranks: Ranks) -> None:
    case = case_of(f"{layout} {MODEL},dtype=float64,checkpoint={checkpoint}")
    pool = ranks(case.world_size)
    for one, other in zip(pool.run(run_compiled, case), pool.run(run_case, case, 2), strict=True):
        for step, right in zip(one.steps, other.steps, strict=True):
            assert step.routing == pytest.approx(right.routing, rel=1e-6)
            assert step.loss == pytest.approx(right.loss, rel=1e-6)
            for piece, right_piece in zip(step.gradients, right.gradients, strict=True):
                norm = np.linalg.norm(right_piece.values)
                assert np.linalg.norm(piece.values - right_piece.values) <= 1e-6 * norm, piece.name
