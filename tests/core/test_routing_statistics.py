"""Metrics of routers against loops over tokens."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers.layouts import record_of
from helpers.resume import Ranks
from torch import Tensor

from internlm.model.moe import router
from internlm.verify.case import Case, Combination
from internlm.verify.record import RankRecord
from internlm.verify.report import judge
from internlm.verify.run import run_case

LINE = "ranks=1 model:family=QWEN3MOE,experts=8,top_k=3,router={},dtype=float64,checkpoint=1,dense_layers=1,layers=3"


def run_and_collect(case: Case) -> tuple[RankRecord, list[tuple[np.ndarray, np.ndarray]]]:
    """Two steps in one process; and of each choice in them, in order, scores and experts."""
    right, chosen = router.choose_experts, []

    def choose(scores: Tensor, form: object, bias: Tensor | None) -> Tensor:
        experts = right(scores, form, bias)  # type: ignore[arg-type]
        chosen.append((scores.numpy(), experts.numpy()))
        return experts

    router.choose_experts = choose  # type: ignore[assignment]
    try:
        return run_case(case, 2), chosen
    finally:
        router.choose_experts = right


@pytest.mark.parametrize("form", ["normalized", "sigmoid_grouped"])
def test_metrics_of_a_step(form: str, ranks: Ranks) -> None:
    (found,) = ranks(1).run(run_and_collect, Combination.parse(LINE.format(form)).case())
    record, chosen = found
    first, second = (step.routing for step in record.steps)
    # Two micro-batches of two layers with experts.
    assert len(chosen) == 8
    biases = {box.name: box.values for box in record.steps[0].weights if box.name.endswith("selection_bias")}
    for number, layer in enumerate((1, 2)):
        scores = np.concatenate([scores for scores, _ in chosen[number:4:2]])
        counts = np.bincount(np.concatenate([experts.flatten() for _, experts in chosen[number:4:2]]), minlength=8)
        rows = [[score / sum(row) for score in row] for row in scores]
        single = np.mean([-sum(p * math.log(p) for p in row) for row in rows]) / math.log(8)
        of_mean = -sum(p * math.log(p) for p in np.mean(rows, axis=0)) / math.log(8)
        assert first[f"moe/load/{layer}"] == pytest.approx(counts.max() / counts.mean())
        assert first[f"moe/token_entropy/{layer}"] == pytest.approx(single, rel=1e-6)
        assert first[f"moe/entropy/{layer}"] == pytest.approx(of_mean, rel=1e-6)
        if form == "normalized":
            continue
        bias = biases[f"layers.{layer}.feed_forward.router.selection_bias"]
        assert first[f"moe/bias_range/{layer}"] == 0.0
        assert second[f"moe/bias_range/{layer}"] == pytest.approx(bias.max() - bias.min(), rel=1e-6)
        assert bias.max() > bias.min()
    assert "moe/load/0" not in first
    for name, extreme in (("entropy", "min"), ("token_entropy", "min"), ("load", "max")):
        both = [second[f"moe/{name}/{layer}"] for layer in (1, 2)]
        assert second[f"moe/{extreme}_{name}"] == (min if extreme == "min" else max)(both)
    assert ("moe/max_bias_range" in second) == ("moe/sequence_loss" in second) == (form == "sigmoid_grouped")


def run_with_capacity(case: Case) -> tuple[RankRecord, list[Tensor], list[tuple[int, int, int]]]:
    """Two steps in one process; of each choice, in order, what is kept, and seed, sample and layer of its noise."""
    right_kept, right_key = router.kept_choices, router.noise_key
    kept: list[Tensor] = []
    keys: list[tuple[int, int, int]] = []

    def kept_choices(*args: Any) -> Tensor:
        kept.append(right_kept(*args))
        return kept[-1]

    def noise_key(*args: int) -> int:
        keys.append((args[0], args[1], args[2]))
        return right_key(*args)

    router.kept_choices, router.noise_key = kept_choices, noise_key  # type: ignore[assignment]
    try:
        return run_case(case, 2), kept, keys
    finally:
        router.kept_choices, router.noise_key = right_kept, right_key


def test_dropped_choices_and_noise_of_a_step(ranks: Ranks) -> None:
    """The share of dropped choices, and noise from the seed of the run, the sample and the layer."""
    case = Combination.parse(f"{LINE.format('normalized')},selection=largest").case()
    (found,) = ranks(1).run(run_with_capacity, case)
    record, kept, keys = found
    # Two steps of two micro-batches of two layers with experts.
    assert len(kept) == 8
    for number, step in enumerate(record.steps):
        own = kept[4 * number : 4 * number + 4]
        for first, layer in enumerate((1, 2)):
            share = 1 - float(torch.stack(own[first::2]).double().mean())
            assert 0 < share < 1 and step.routing[f"moe/dropped/{layer}"] == pytest.approx(share)
        assert step.routing["moe/dropped"] == pytest.approx(1 - float(torch.stack(own).double().mean()))
    assert set(keys) == {(case.config.seed, sample, layer) for sample in range(4) for layer in (1, 2)}


@pytest.mark.parametrize("selection", ["largest", "gshard_random"])
def test_recomputation_has_the_noise_of_the_forward_pass(selection: str, ranks: Ranks) -> None:
    """A run with recomputation against one without, which the matrix does not compare."""
    line = f"{LINE.format('normalized')},selection={selection} stepping:micro_batches=3"
    case = Combination.parse(line).case()
    without = Combination.parse(line.replace("checkpoint=1", "checkpoint=0")).case()
    verdict = judge(case, record_of(case, ranks), record_of(without, ranks))
    assert verdict.is_equal, verdict.explain()
