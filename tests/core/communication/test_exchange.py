"""Every exchange against the same thing written with one tensor that all ranks can see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from internlm.core.communication import exchange as ex

RANKS = 4
SHAPE = (2, 8, 12)
"""[B, S, h] of the whole; B > 1, so parts along the sequence are not contiguous."""


def whole(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rank_input(rank: int, dim: int | None) -> Tensor:
    """What a rank puts in: its part of one tensor along `dim`, or a whole tensor of its own."""
    x = whole(0).chunk(RANKS, dim)[rank].clone() if dim is not None else whole(rank)
    return x.requires_grad_()


def run(name: str, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Output, the gradient put in at the output, and the gradient that arrives at the input, on this rank."""
    rank, group = dist.get_rank(), dist.group.WORLD
    calls: dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]] = {
        "gather": (rank_input(rank, dim), lambda x: ex.gather(x, group, dim)),
        "gather_replicated": (rank_input(rank, dim), lambda x: ex.gather_replicated(x, group, dim)),
        "reduce_scatter": (rank_input(rank, None), lambda x: ex.reduce_scatter(x, group, dim)),
        "sum_over_ranks": (rank_input(rank, None), lambda x: ex.sum_over_ranks(x, group)),
        "copy_to_ranks": (rank_input(0, None), lambda x: ex.copy_to_ranks(x, group)),
        "exchange": (rank_input(rank, 1), lambda x: ex.exchange(x, group, split=2, join=1)),
    }
    x, function = calls[name]
    out = function(x)
    # A replicated result is used alike by all ranks; elsewhere every rank goes its own way.
    grad = whole(50 if name in ("gather_replicated", "sum_over_ranks") else 100 + rank, tuple(out.shape))
    out.backward(grad)
    assert x.grad is not None
    return out.detach(), grad, x.grad


@pytest.mark.parametrize("dim", [1, 2])
def test_gather(dim: int, ranks: Any) -> None:
    results = ranks(RANKS).run(run, "gather", dim)
    total = sum(grad for _, grad, _ in results)
    for rank, (out, _, grad_x) in enumerate(results):
        assert torch.equal(out, whole(0))
        torch.testing.assert_close(grad_x, total.chunk(RANKS, dim)[rank])


@pytest.mark.parametrize("dim", [1, 2])
def test_gather_replicated(dim: int, ranks: Any) -> None:
    for rank, (out, grad, grad_x) in enumerate(ranks(RANKS).run(run, "gather_replicated", dim)):
        assert torch.equal(out, whole(0))
        assert torch.equal(grad_x, grad.chunk(RANKS, dim)[rank])


@pytest.mark.parametrize("dim", [1, 2])
def test_reduce_scatter(dim: int, ranks: Any) -> None:
    results = ranks(RANKS).run(run, "reduce_scatter", dim)
    total = sum(whole(rank) for rank in range(RANKS))
    grads = torch.cat([grad for _, grad, _ in results], dim)
    for rank, (out, _, grad_x) in enumerate(results):
        torch.testing.assert_close(out, total.chunk(RANKS, dim)[rank])
        assert torch.equal(grad_x, grads)


def test_sum_over_ranks(ranks: Any) -> None:
    total = sum(whole(rank) for rank in range(RANKS))
    for out, grad, grad_x in ranks(RANKS).run(run, "sum_over_ranks", 1):
        torch.testing.assert_close(out, total)
        assert torch.equal(grad_x, grad)


def test_copy_to_ranks(ranks: Any) -> None:
    results = ranks(RANKS).run(run, "copy_to_ranks", 1)
    for out, _, grad_x in results:
        assert torch.equal(out, whole(0))
        torch.testing.assert_close(grad_x, sum(grad for _, grad, _ in results))


def test_exchange_trades_sequence_for_channels(ranks: Any) -> None:
    results = ranks(RANKS).run(run, "exchange", 1)
    grads = torch.cat([grad for _, grad, _ in results], dim=2)
    for rank, (out, _, grad_x) in enumerate(results):
        assert torch.equal(out, whole(0).chunk(RANKS, 2)[rank])
        assert torch.equal(grad_x, grads.chunk(RANKS, 1)[rank])
