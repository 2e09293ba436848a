"""Splits the output of a fused projection into the outputs of its parts.

With plain slices, autograd would fill a zero tensor of the full width for each slice, and sum them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def unpack_query_key_value(packed: Tensor, group_size: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a projection whose rows are ordered by key-value head.

    Args:
        packed: `[..., K (g + 2) D]`: for each of K key-value heads its g query heads, its key, its value.
        group_size: g.
        head_dim: D.

    Returns:
        q `[..., K g D]`, k `[..., K D]` and v `[..., K D]`, contiguous, so that none keeps the packed tensor alive.
    """
    groups = packed.unflatten(-1, (-1, group_size + 2, head_dim))
    if torch.compiler.is_compiling():
        return _split_groups(groups)
    q, k, v = _UnpackQueryKeyValue.apply(groups)
    return q, k, v


def unpack_gate_up(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up projection, `[..., f]` each, as views of `[..., 2 f]`, gate first."""
    if torch.compiler.is_compiling():
        gate, up = packed.chunk(2, dim=-1)
    else:
        gate, up = _UnpackGateUp.apply(packed)
    return gate, up


def _split_groups(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`[..., K, g + 2, D]` -> q, k, v with their heads flattened."""
    return groups[..., :-2, :].flatten(-3), groups[..., -2, :].flatten(-2), groups[..., -1, :].flatten(-2)


class _UnpackQueryKeyValue(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.shape = groups.shape
        # With one key-value head, flattening returns views.
        q, k, v = (part.contiguous() for part in _split_groups(groups))
        return q, k, v

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> Tensor:
        *_, group, head_dim = ctx.shape
        grad = grad_q.new_empty(ctx.shape)
        grad[..., :-2, :] = grad_q.unflatten(-1, (-1, group - 2, head_dim))
        grad[..., -2, :] = grad_k.unflatten(-1, (-1, head_dim))
        grad[..., -1, :] = grad_v.unflatten(-1, (-1, head_dim))
        return grad


class _UnpackGateUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = packed.chunk(2, dim=-1)
        return gate, up

    @staticmethod
    def backward(ctx: Any, grad_gate: Tensor, grad_up: Tensor) -> Tensor:
        return torch.cat((grad_gate, grad_up), dim=-1)
