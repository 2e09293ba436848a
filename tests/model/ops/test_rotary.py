"""Turning against multiplication of complex numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from internlm.model.ops import rotary as rotary_module
from internlm.model.ops.rotary import RotaryTables, apply_rotary

BATCH, LENGTH, DIM = 2, 9, 6


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _reference(x: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles).unsqueeze(2)
    if interleaved:
        return torch.view_as_real(turned).flatten(-2)
    return torch.cat((turned.real, turned.imag), -1)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks a row, the last one short."""
    monkeypatch.setattr(rotary_module, "_CHUNK_ELEMENTS", 4 * 3 * DIM)


@pytest.mark.parametrize("interleaved", [False, True])
def test_turning(interleaved: bool) -> None:
    x, angles = _draw(BATCH, LENGTH, 3, DIM), _draw(BATCH, LENGTH, DIM // 2, seed=1)
    tables = RotaryTables.of(angles, interleaved, torch.float64)
    torch.testing.assert_close(apply_rotary(x, tables), _reference(x, angles, interleaved))
    doubled = RotaryTables.of(angles, interleaved, torch.float64, factor=2.0)
    torch.testing.assert_close(apply_rotary(x, doubled), 2 * _reference(x, angles, interleaved))
    # A view with strides of its own.
    turned = apply_rotary(x.transpose(0, 1).contiguous().transpose(0, 1), tables)
    torch.testing.assert_close(turned, _reference(x, angles, interleaved))


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradient(interleaved: bool) -> None:
    tables = RotaryTables.of(_draw(1, 3, 2, seed=1), interleaved, torch.float64)
    assert torch.autograd.gradcheck(lambda x: apply_rotary(x, tables), _draw(1, 3, 2, 4).requires_grad_())


@pytest.mark.parametrize("interleaved", [False, True])
def test_channels_beyond_the_tables_stay(interleaved: bool) -> None:
    x, angles = _draw(BATCH, LENGTH, 3, DIM + 4).requires_grad_(), _draw(BATCH, LENGTH, DIM // 2, seed=1)
    tables = RotaryTables.of(angles, interleaved, torch.float64)
    turned = torch.cat((_reference(x[..., :DIM], angles, interleaved), x[..., DIM:]), -1)
    torch.testing.assert_close(apply_rotary(x, tables), turned)
    gradients = [torch.autograd.grad(out.sin().sum(), x)[0] for out in (apply_rotary(x, tables), turned)]
    torch.testing.assert_close(*gradients)
    compiled = torch.compile(apply_rotary, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, tables), turned)


def test_bf16_is_rounded_once() -> None:
    x, angles = _draw(BATCH, LENGTH, 3, DIM).bfloat16(), _draw(BATCH, LENGTH, DIM // 2, seed=1)
    turned = apply_rotary(x, RotaryTables.of(angles, False, torch.float32))
    assert turned.dtype == torch.bfloat16
    torch.testing.assert_close(turned.double(), _reference(x.double(), angles, False), rtol=2**-8, atol=1e-6)
