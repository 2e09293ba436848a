"""Attention sinks against a softmax with one more column."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from internlm.model.ops.attention.causal_attention import VarlenMetadata
from internlm.model.ops.attention.sink_attention import sink_attention

LENGTHS = (1, 9, 4, 9)


def with_a_column(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, window: int | None) -> Tensor:
    """Rows `[B, S, H, D]` as one document each; the value of the sink is 0."""
    length, group = q.shape[1], q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2) for x in (k, v))
    scores = torch.einsum("bshd,bthd->bhst", q, k) / q.shape[-1] ** 0.5
    distance = torch.arange(length)[:, None] - torch.arange(length)
    hidden = (distance < 0) | (distance >= (window or length))
    column = sinks.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    weights = torch.cat((scores.masked_fill(hidden, -torch.inf), column), -1).softmax(-1)
    return torch.einsum("bhst,bthd->bshd", weights[..., :-1], v)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("packed", [False, True])
def test_values_and_gradients(packed: bool, window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    batch, length = (1, sum(LENGTHS)) if packed else (2, 11)
    shapes = (batch, length, 4, 6), (batch, length, 2, 6), (batch, length, 2, 6), (4,)
    inputs = [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]
    q, k, v, sinks = inputs
    ours = sink_attention(q, k, v, sinks, VarlenMetadata.of(LENGTHS) if packed else None, window=window)
    sizes = LENGTHS if packed else (length,)
    documents = zip(*(x.split(sizes, 1) for x in (q, k, v)), strict=True)
    theirs = torch.cat([with_a_column(*document, sinks, window) for document in documents], 1)
    torch.testing.assert_close(ours, theirs)
    expected = torch.autograd.grad(theirs.sin().sum(), inputs)
    for mine, reference in zip(torch.autograd.grad(ours.sin().sum(), inputs), expected, strict=True):
        torch.testing.assert_close(mine, reference)
