"""Gated activations against their definition."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from internlm.model.ops.gated_activation import Activation, gated_activation, packed_gated_activation


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(5,), (2, 3, 7), (0, 4)])
def test_gated_activation(shape: tuple[int, ...], activation: Activation) -> None:
    generator = torch.Generator().manual_seed(0)
    gate, up, grad = (torch.randn(*shape, dtype=torch.float64, generator=generator) for _ in range(3))
    gate.requires_grad_(), up.requires_grad_()
    activated = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    expected = torch.autograd.grad(activated * up, (gate, up), grad, retain_graph=True)

    ours = gated_activation(gate, up, activation)
    torch.testing.assert_close(ours, activated * up)
    for mine, reference in zip(torch.autograd.grad(ours, (gate, up), grad), expected, strict=True):
        torch.testing.assert_close(mine, reference)


def test_clamped_silu() -> None:
    """Elements beyond the limits on each side of each input, and their gradients."""
    gate, up = (
        x.flatten().requires_grad_()
        for x in torch.meshgrid(*(torch.tensor([-9.0, -3.0, 0.5, 6.0, 8.0], dtype=torch.float64),) * 2, indexing="ij")
    )
    clamped = torch.minimum(gate, torch.tensor(7.0))
    expected = clamped / (1 + torch.exp(-1.702 * clamped)) * (1 + up.clamp(-7, 7))
    ours = gated_activation(gate, up, "clamped_silu")
    torch.testing.assert_close(ours, expected)
    theirs = torch.autograd.grad(expected.sin().sum(), (gate, up))
    for mine, reference in zip(torch.autograd.grad(ours.sin().sum(), (gate, up)), theirs, strict=True):
        torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "clamped_silu"])
def test_packed_equals_separate(activation: Activation, dtype: torch.dtype) -> None:
    gate_up = torch.randn(5, 14, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    separate, packed = gated_activation(*gate_up.chunk(2, -1), activation), packed_gated_activation(gate_up, activation)
    assert torch.equal(packed, separate)
    gradients = [torch.autograd.grad(out, gate_up, torch.cos(out.detach()))[0] for out in (packed, separate)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gradient(activation: Activation) -> None:
    x = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gated_activation(x[:, :4], x[:, 4:], activation), x)
