"""Biases of experts, with experts that have no row."""

from __future__ import annotations

import pytest
import torch

from internlm.model.moe.expert_bias import add_expert_bias


@pytest.mark.parametrize("counts", [[3, 0, 4, 0], [0, 0, 0, 0], [7, 0, 0, 0]])
def test_each_row_gets_the_bias_of_its_expert(counts: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, bias = (torch.randn(n, 5, dtype=torch.float64, generator=generator) for n in (sum(counts), 4))
    rows.requires_grad_(), bias.requires_grad_()
    numbers = [expert for expert, count in enumerate(counts) for _ in range(count)]
    expected = rows + bias[numbers]
    ours = add_expert_bias(rows, bias, torch.tensor(counts))
    torch.testing.assert_close(ours, expected)
    theirs = torch.autograd.grad(expected.square().sum(), (rows, bias))
    for mine, reference in zip(torch.autograd.grad(ours.square().sum(), (rows, bias)), theirs, strict=True):
        torch.testing.assert_close(mine, reference)
