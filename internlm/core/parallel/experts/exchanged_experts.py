"""Experts of other ranks: rows travel to the rank of their expert, and the results back.

Gradients need no factor: the backward pass of the exchange brings every rank's contributions to the rank that holds the
expert, and the loss is a sum. Source of the exchange: Lepikhin et al. 2020, arXiv:2006.16668.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from internlm.model.moe.expert_order import permute
from internlm.model.recompute import as_routing_operator


class ExchangedExperts(nn.Module):
    """All experts of a layer, of which this rank holds an equal share. Takes the place of `Experts`.

    One wait for the device in each forward pass: the host needs the numbers of rows that ranks send one another.

    Args:
        experts: those of this rank, an `Experts` with its share of the weights.
        group: the ranks of the expert axis, which hold the experts in order.
    """

    def __init__(self, experts: nn.Module, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.local = experts
        self._group = group
        self._size = dist.get_world_size(group)

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Rows sorted by expert, `[M, h]`, and int64 `[E]` of them for each expert -> results, `[M, h]`. Collective."""

        # In one operator that recomputation does not repeat.
        def exchange_counts() -> list[Tensor]:
            sent = counts.view(self._size, -1)
            received = torch.empty_like(sent)
            dist.all_to_all_single(received, sent, group=self._group)
            return [received]

        (received,) = as_routing_operator(exchange_counts, counts)
        # Copied together, so that the host waits once.
        sizes = torch.stack([counts.view(self._size, -1).sum(1), received.sum(1)]).tolist()
        arrived: Tensor = _ExchangeRows.apply(rows, sizes[0], sizes[1], self._group)
        # Sorted by rank, then by expert; the experts of this rank need them by expert, then by rank.
        number = torch.arange(received.numel(), device=received.device) % received.shape[1]
        experts = number.repeat_interleave(received.flatten(), output_size=arrived.shape[0])
        order = experts.argsort(stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        results = self.local(permute(arrived, order, inverse), received.sum(0))
        out: Tensor = _ExchangeRows.apply(permute(results, inverse, order), sizes[1], sizes[0], self._group)
        return out


class _ExchangeRows(torch.autograd.Function):
    """All-to-all of rows with different numbers for each rank; its transpose is the exchange back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sizes, ctx.group = (sent, received), group
        return _exchange(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        sent, received = ctx.sizes
        return _exchange(grad, received, sent, ctx.group), None, None, None


def _exchange(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    output = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(output, rows.contiguous(), received, sent, group=group)
    return output
