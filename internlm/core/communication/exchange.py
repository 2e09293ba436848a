"""Differentiable collectives.

Shapes: B sequences, S tokens, n ranks; dimension 1 is the sequence. Each function is named after its forward pass; its
backward pass is the transposed collective. With a group of None (one rank), every function returns its input.

Source: the pairs f / f-bar and g / g-bar of Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053; Korthikanti et al.
2022, arXiv:2205.05198), and the all-to-all of DeepSpeed-Ulysses (Jacobs et al. 2023, arXiv:2309.14509).
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from internlm.core.communication.collectives import all_gather_async, all_reduce_async, all_to_all, reduce_scatter_async
from internlm.core.communication.pending import NO_TIMEOUT, Pending

SEQUENCE = 1
"""The sequence dimension of activations."""


class _PendingParts(Pending):
    """Parts `[n, ...]`, one a rank, that are concatenated along `dim` once they have arrived."""

    def __init__(self, parts: Tensor, work: Pending, dim: int) -> None:
        super().__init__(parts, work)
        self._dim = dim

    def wait(self, timeout: timedelta = NO_TIMEOUT) -> Tensor:
        return _join(super().wait(timeout), self._dim)


def _join(parts: Tensor, dim: int) -> Tensor:
    """Concatenate the parts `[n, ...]` along `dim`."""
    return parts.movedim(0, dim).flatten(dim, dim + 1)


def _cut(tensor: Tensor, dim: int, num_parts: int) -> Tensor:
    """The inverse of `_join`: `[n, ...]`, contiguous."""
    parts: Tensor = tensor.unflatten(dim, (num_parts, -1))
    return parts.movedim(dim, 0).contiguous()


def start_gather(x: Tensor, group: dist.ProcessGroup | None, dim: int = SEQUENCE) -> Pending:
    """Start the all-gather of every rank's `x`, concatenated along `dim` in rank order."""
    if group is None:
        return Pending(x)
    parts = x.new_empty(dist.get_world_size(group), *x.shape)
    return _PendingParts(parts, all_gather_async(parts.view(-1), x.flatten(), group), dim)


def start_reduce_scatter(x: Tensor, group: dist.ProcessGroup | None, dim: int = SEQUENCE) -> Pending:
    """Start the reduce-scatter (sum) of `x`: each rank gets its part along `dim`."""
    if group is None:
        return Pending(x)
    parts = _cut(x, dim, dist.get_world_size(group))
    own = torch.empty_like(parts[0])
    return Pending(own, reduce_scatter_async(own.view(-1), parts.view(-1), group))


def start_all_reduce(x: Tensor, group: dist.ProcessGroup | None) -> Pending:
    """Start the all-reduce (sum) of `x`, in place."""
    return all_reduce_async(x, group)


def own_part(x: Tensor, group: dist.ProcessGroup | None, dim: int = SEQUENCE) -> Tensor:
    """This rank's part of `x` along `dim`: a view, whose backward pass communicates nothing."""
    if group is None:
        return x
    return x.chunk(dist.get_world_size(group), dim)[dist.get_rank(group)]


def copy_to_ranks(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Identity; the gradient is all-reduced (sum)."""
    return x if group is None else _CopyToRanks.apply(x, group)


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """All-reduce (sum); the gradient, equal on all ranks, passes through."""
    return x if group is None else _SumOverRanks.apply(x, group)


def gather(x: Tensor, group: dist.ProcessGroup | None, dim: int = SEQUENCE) -> Tensor:
    """All-gather along `dim`; the gradient is reduce-scattered, as each rank uses the result differently."""
    return x if group is None else _AllGather.apply(x, group, dim)


def gather_replicated(x: Tensor, group: dist.ProcessGroup | None, dim: int = SEQUENCE) -> Tensor:
    """All-gather along `dim`; the gradient is this rank's part of it, as all ranks use the result in the same way."""
    return x if group is None else _GatherReplicated.apply(x, group, dim)


def reduce_scatter(x: Tensor, group: dist.ProcessGroup | None, dim: int = SEQUENCE) -> Tensor:
    """Reduce-scatter (sum) along `dim`; the gradient is all-gathered."""
    return x if group is None else _ReduceScatter.apply(x, group, dim)


def exchange(x: Tensor, group: dist.ProcessGroup | None, *, split: int, join: int) -> Tensor:
    """All-to-all: rank r gets part r along `split` of every rank's `x`, concatenated along `join`."""
    return x if group is None else _Exchange.apply(x, group, split, join)


class _CopyToRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return start_all_reduce(grad.clone(), ctx.group).wait(), None


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return start_all_reduce(x.contiguous().clone(), group).wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return start_gather(x, group, dim).wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return start_reduce_scatter(grad, ctx.group, ctx.dim).wait(), None, None


class _GatherReplicated(_AllGather):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return own_part(grad, ctx.group, ctx.dim), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return start_reduce_scatter(x, group, dim).wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return start_gather(grad, ctx.group, ctx.dim).wait(), None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, split: int, join: int) -> Tensor:
        ctx.group, ctx.split, ctx.join = group, split, join
        return _join(all_to_all(_cut(x, split, dist.get_world_size(group)), group), join)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        parts = _cut(grad, ctx.join, dist.get_world_size(ctx.group))
        return _join(all_to_all(parts, ctx.group), ctx.split), None, None, None
