"""Routing on a GPU chooses the experts that a CPU chooses, ties and NaN included, and waits for nothing."""

from __future__ import annotations

import math

import pytest
import torch

from internlm.model.moe.balance import counts_by_sequence, load_balancing_loss, sequence_balancing_loss, z_loss
from internlm.model.moe.router_form import RouterForm
from internlm.model.moe.routing import choose_experts, expert_distribution, probabilities, weights_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

FORMS = [
    RouterForm(8, 2),
    RouterForm(60, 4, normalizes=False),
    RouterForm(128, 8),
    RouterForm(160, 6, normalizes=False, scale=16.0, num_groups=8, top_groups=3),
    RouterForm(256, 8, "sigmoid", True, 2.5, True, num_groups=8, top_groups=4, group_score="top2_sum"),
    RouterForm(384, 8, "sigmoid", True, 2.827, True),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: str(form.num_experts))
def test_choices_equal_those_of_a_cpu(form: RouterForm, dtype: torch.dtype) -> None:
    """Scores of nine values, so that most borders between chosen and not are ties."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 9, (2000, form.num_experts), generator=generator).to(dtype) / 8
    scores[::100, ::3] = math.nan
    bias = torch.randint(-3, 3, (form.num_experts,), generator=generator) / 8 if form.has_bias else None
    truth = choose_experts(scores, form, bias)
    mine = choose_experts(scores.cuda(), form, None if bias is None else bias.cuda())
    assert torch.equal(mine.cpu(), truth)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: str(form.num_experts))
def test_weights_losses_and_gradients(form: RouterForm) -> None:
    logits = torch.randn(512, form.num_experts, generator=torch.Generator().manual_seed(1))
    bias = torch.zeros(form.num_experts) if form.has_bias else None
    experts = choose_experts(probabilities(logits, form), form, bias)
    results = []
    for device in ("cpu", "cuda"):
        leaf = logits.to(device, copy=True).requires_grad_()
        own, own_bias = experts.to(device), None if bias is None else bias.to(device)
        sequences, num_tokens = torch.arange(512, device=device) // 100, torch.tensor(512, device=device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            scores = probabilities(leaf, form)
            choose_experts(scores, form, own_bias)
            rows = expert_distribution(scores, form)
            counts = counts_by_sequence(own, sequences, 6, form.num_experts)
            weights = weights_of(scores, own, form)
            losses = torch.stack(
                [
                    load_balancing_loss(rows, counts.sum(0), num_tokens, form.top_k),
                    z_loss(leaf, num_tokens),
                    sequence_balancing_loss(rows, counts, sequences, num_tokens),
                ]
            )
            (gradient,) = torch.autograd.grad(weights.square().sum() + losses.sum(), leaf)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results.append([each.detach().cpu() for each in (weights, losses, gradient)])
    for truth, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-5, atol=1e-6)
