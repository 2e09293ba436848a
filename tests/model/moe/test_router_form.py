from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from helpers.routing import router_forms
from hypothesis import given, settings

from internlm.model.moe.router_form import RouterForm
from internlm.model.moe.routing import choose_experts, probabilities, weights_of


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 0}, "num_experts = 0 must be at least 1"),
        ({"top_k": 0}, "top_k = 0 must be at least 1"),
        ({"top_k": 9}, "top_k = 9 must be at most num_experts = 8"),
        ({"scores": "tanh"}, "scores = 'tanh' must be one of 'softmax', 'sigmoid'"),
        ({"scale": 0.0}, "scale = 0.0 must be a finite number above 0"),
        ({"scale": -2.5}, "scale = -2.5 must be a finite number above 0"),
        ({"scale": float("nan")}, "scale = nan must be a finite number above 0"),
        ({"scale": float("inf")}, "scale = inf must be a finite number above 0"),
        ({"num_groups": 0}, "num_groups = 0 must be at least 1"),
        ({"num_groups": 3}, "num_groups = 3 must divide num_experts = 8"),
        ({"top_groups": 0}, "top_groups = 0 must be at least 1"),
        ({"num_groups": 2, "top_groups": 3}, "top_groups = 3 must be at most num_groups = 2"),
        ({"top_groups": 2}, "top_groups = 2 must be at most num_groups = 1"),
        ({"group_score": "mean"}, "group_score = 'mean' must be one of 'max', 'top2_sum'"),
        ({"num_groups": 8, "top_groups": 4, "group_score": "top2_sum"}, "num_groups = 8 must be at most 4, half of"),
        ({"num_groups": 4, "top_k": 3}, "top_groups = 1 must be at least 2: groups of 2 experts have to provide"),
        ({"num_groups": 4, "top_k": 5, "top_groups": 2}, "top_groups = 2 must be at least 3"),
    ],
)
def test_errors_name_field_value_and_what_is_allowed(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        RouterForm(**{"num_experts": 8, "top_k": 2, **changes})


def test_what_an_error_advises_is_valid() -> None:
    RouterForm(num_experts=8, top_k=5, num_groups=4, top_groups=3)
    RouterForm(num_experts=8, top_k=2, num_groups=4, top_groups=1, group_score="top2_sum")


def test_group_score_matters_only_with_a_limit() -> None:
    form = RouterForm(num_experts=4, top_k=2, num_groups=4, top_groups=4, group_score="top2_sum")
    assert not form.has_group_limit
    assert dataclasses.replace(form, group_score="max", top_groups=2).has_group_limit
    assert RouterForm(num_experts=12, top_k=1, num_groups=3, top_groups=3).experts_per_group == 4


def test_forms_are_values() -> None:
    form = RouterForm(num_experts=8, top_k=2)
    assert form == RouterForm(num_experts=8, top_k=2) and hash(form) == hash(RouterForm(num_experts=8, top_k=2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        form.top_k = 3  # type: ignore[misc]


@settings(max_examples=100, deadline=None)
@given(router_forms())
def test_every_valid_form_routes(form: RouterForm) -> None:
    scores = probabilities(torch.randn(3, form.num_experts, generator=torch.Generator().manual_seed(0)), form)
    experts = choose_experts(scores, form, torch.zeros(form.num_experts) if form.has_bias else None)
    assert experts.shape == weights_of(scores, experts, form).shape == (3, form.top_k)
    groups = experts // form.experts_per_group
    for row, of_row in zip(experts.tolist(), groups.tolist(), strict=True):
        assert len(set(row)) == form.top_k and len(set(of_row)) <= form.top_groups
