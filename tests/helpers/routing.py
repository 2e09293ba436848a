"""Routing as loops over tokens and experts, and forms of routers to draw from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from internlm.model.moe.router_form import RouterForm


@st.composite
def router_forms(draw: st.DrawFn) -> RouterForm:
    """Any valid form of up to 16 experts."""
    num_groups = draw(st.integers(1, 4))
    per_group = draw(st.integers(1, 4))
    top_groups = draw(st.integers(1, num_groups))
    score = draw(st.sampled_from(["max", "top2_sum"] if per_group > 1 else ["max"]))
    return RouterForm(
        num_experts=num_groups * per_group,
        top_k=draw(st.integers(1, top_groups * per_group)),
        scores=draw(st.sampled_from(["softmax", "sigmoid"])),
        normalizes=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 2.5])),
        has_bias=draw(st.booleans()),
        num_groups=num_groups,
        top_groups=top_groups,
        group_score=score,
    )


def scores_in_a_loop(logits: Sequence[float], form: RouterForm) -> list[float]:
    """Scores of one token, in float64."""
    if form.scores == "sigmoid":
        return [1 / (1 + np.exp(-float(logit))) for logit in logits]
    exponentials = [np.exp(float(logit) - max(logits)) for logit in logits]
    return [each / sum(exponentials) for each in exponentials]


def choice_in_a_loop(scores: Sequence[Any], form: RouterForm, bias: Sequence[Any] | None = None) -> list[int]:
    """Experts of one token: sorted by (score descending, index ascending); sums are in the type of the scores."""
    values = list(scores) if bias is None else [score + each for score, each in zip(scores, bias, strict=True)]
    size = form.num_experts // form.num_groups
    groups = [list(range(group * size, (group + 1) * size)) for group in range(form.num_groups)]

    def group_score(group: list[int]) -> Any:
        best = sorted((values[expert] for expert in group), reverse=True)
        return best[0] if form.group_score == "max" or len(best) < 2 else best[0] + best[1]

    kept = sorted(groups, key=lambda group: (-group_score(group), group[0]))[: form.top_groups]
    candidates = [expert for group in kept for expert in group]
    return sorted(candidates, key=lambda expert: (-values[expert], expert))[: form.top_k]


def weights_in_a_loop(scores: Sequence[float], experts: Sequence[int], form: RouterForm) -> list[float]:
    """Weights of the experts of one token."""
    chosen = [scores[expert] for expert in experts]
    total = sum(chosen) + (1e-20 if form.scores == "sigmoid" else 0.0)
    return [form.scale * (each / total if form.normalizes else each) for each in chosen]
