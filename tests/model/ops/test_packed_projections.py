"""Separate outputs of packed projections equal slices of them, and so do their gradients."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from internlm.model.ops.packed_projections import unpack_gate_up, unpack_query_key_value

HEAD_DIM = 4


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("leading", [(2, 3), (5,), (2, 0)])
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("group", [1, 3])
def test_queries_keys_and_values(group: int, kv_heads: int, leading: tuple[int, ...]) -> None:
    packed = _draw(*leading, kv_heads * (group + 2) * HEAD_DIM).requires_grad_()
    # Head by head, in the order of the rows.
    heads = packed.split(HEAD_DIM, dim=-1)
    width = group + 2
    expected = (
        torch.cat([head for number, head in enumerate(heads) if number % width < group], dim=-1),
        torch.cat([head for number, head in enumerate(heads) if number % width == group], dim=-1),
        torch.cat([head for number, head in enumerate(heads) if number % width == group + 1], dim=-1),
    )
    outputs = unpack_query_key_value(packed, group, HEAD_DIM)
    for output, reference in zip(outputs, expected, strict=True):
        assert torch.equal(output, reference) and output.is_contiguous()
        assert output.numel() == 0 or output.untyped_storage().data_ptr() != packed.untyped_storage().data_ptr()
    grads = [_draw(*output.shape, seed=3 + number) for number, output in enumerate(outputs)]
    assert torch.equal(*(torch.autograd.grad(form, packed, grads)[0] for form in (outputs, expected)))


def test_gate_and_up() -> None:
    packed = _draw(2, 3, 10).requires_grad_()
    outputs, expected = unpack_gate_up(packed), packed.split(5, dim=-1)
    for output, reference in zip(outputs, expected, strict=True):
        assert torch.equal(output, reference)
        assert output.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()
    grads = [_draw(2, 3, 5, seed=3), _draw(2, 3, 5, seed=4)]
    assert torch.equal(*(torch.autograd.grad(form, packed, grads)[0] for form in (outputs, expected)))


def test_one_output_without_effect_has_a_gradient_of_zero() -> None:
    packed = _draw(3, 10).requires_grad_()
    gate, _ = unpack_gate_up(packed)
    (grad,) = torch.autograd.grad(gate.sum(), packed)
    assert torch.equal(grad, torch.cat((torch.ones(3, 5), torch.zeros(3, 5)), dim=-1).double())


@pytest.mark.parametrize("unpack", [partial(unpack_query_key_value, group_size=2, head_dim=4), unpack_gate_up])
def test_compiled(unpack) -> None:  # type: ignore[no-untyped-def]
    packed = _draw(2, 3, 32).requires_grad_()
    compiled = torch.compile(unpack, backend="aot_eager", fullgraph=True)
    grads = [_draw(*output.shape, seed=3) for output in unpack(packed)]
    for output, reference in zip(compiled(packed), unpack(packed), strict=True):
        assert torch.equal(output, reference)
    assert torch.equal(*(torch.autograd.grad(form(packed), packed, grads)[0] for form in (compiled, unpack)))
