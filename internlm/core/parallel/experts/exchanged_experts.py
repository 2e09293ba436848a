"""Experts of other ranks: rows travel to the rank of their expert, and the results back.

Gradients need no factor: the backward pass of the exchange brings every rank's contributions to the rank that holds the
expert, and the loss is a sum. Source of the exchange: Lepikhin et al. 2020, arXiv:2006.16668.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from internlm.core.communication.pending import Pending
from internlm.model.moe.expert_order import permute
from internlm.model.recompute import as_routing_operator
from internlm.utils.copy_stream import CopyStream


class CountsExchange:
    """The numbers of rows that ranks send one another: started early, so that other work hides it.

    In recomputation, it is not repeated, and the host waits for nothing.

    Args:
        counts: int64 `[E]`, rows of this rank for each expert.
        group: the ranks of the expert axis.
        stream: copies the numbers to the host.
    """

    def __init__(self, counts: Tensor, group: dist.ProcessGroup, stream: CopyStream) -> None:
        self._sent = counts.view(dist.get_world_size(group), -1)
        self._stream = stream
        self._received: Pending | None = None

        # An operator without results, so that none is saved before it has arrived.
        def start() -> list[Tensor]:
            received = torch.empty_like(self._sent)
            work = dist.all_to_all_single(received, self._sent, group=group, async_op=True)
            self._received = Pending(received, work)
            return []

        as_routing_operator(start, counts)

    def wait(self) -> tuple[Tensor, list[int], list[int]]:
        """Rows of each rank for each of this rank's experts, `[ep, e]`; rows sent to each rank, and received from it.

        The host waits for these numbers, but not for what the device was given to do in the meantime.
        """

        def finish() -> list[Tensor]:
            pending = self._received
            assert pending is not None

            def copy() -> tuple[Tensor, Tensor]:
                received = pending.wait()
                sizes = torch.stack([self._sent.sum(1), received.sum(1)])
                on_host = self._stream.new_host_buffer(sizes.numel(), sizes.dtype).view_as(sizes)
                return received, on_host.copy_(sizes, non_blocking=True)

            copied = self._stream.run(copy)
            # The device waits too: memory of the tensors may be reused behind what follows.
            copied.wait()
            return list(copied.synchronize())

        received, sizes = as_routing_operator(finish, self._sent)
        sent_by_rank, received_by_rank = sizes.tolist()
        return received, sent_by_rank, received_by_rank


class ExchangedExperts(nn.Module):
    """All experts of a layer, of which this rank holds an equal share. Takes the place of `Experts`.

    One wait for the device in each forward pass: the host needs the numbers of rows that ranks send one another.

    Args:
        experts: those of this rank, an `Experts` with its share of the weights.
        group: the ranks of the expert axis, which hold the experts in order.
        stream: copies numbers of rows to the host.
    """

    def __init__(self, experts: nn.Module, group: dist.ProcessGroup, stream: CopyStream) -> None:
        super().__init__()
        self.local = experts
        self._group = group
        self._stream = stream

    def start(self, counts: Tensor) -> CountsExchange:
        """Start the exchange of int64 `[E]`, numbers of rows for each expert, which `forward` needs. Collective."""
        return CountsExchange(counts, self._group, self._stream)

    def forward(self, rows: Tensor, counts: CountsExchange) -> Tensor:
        """Rows sorted by expert, `[M, h]`, and their numbers, from `start` -> results, `[M, h]`. Collective."""
        received, sent_by_rank, received_by_rank = counts.wait()
        arrived: Tensor = _ExchangeRows.apply(rows, sent_by_rank, received_by_rank, self._group)
        # Sorted by rank, then by expert; the experts of this rank need them by expert, then by rank.
        number = torch.arange(received.numel(), device=received.device) % received.shape[1]
        experts = number.repeat_interleave(received.flatten(), output_size=arrived.shape[0])
        order = experts.argsort(stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        results = self.local(permute(arrived, order, inverse), received.sum(0))
        back = permute(results, inverse, order)
        out: Tensor = _ExchangeRows.apply(back, received_by_rank, sent_by_rank, self._group)
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
