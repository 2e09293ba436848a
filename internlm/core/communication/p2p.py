"""Tensors from one rank of a pipeline to another, in the background.

A channel is a one-way road between two ranks for one kind of tensor. Each has a process group of its own: NCCL keeps
the operations of a group in order, so a receive that waits for its peer would hold up every send behind it. On a
channel there is only one kind of operation on either side, and nothing to hold up. Tensors carry no name: they arrive
in the order in which they were sent. Knows no schedule: what travels when is said by the caller.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from internlm.core.communication.pending import Pending
from internlm.core.context.parallel_context import ParallelContext

Channel = tuple[int, int, str]
"""(sender, receiver, what it carries); the ranks count along the pipeline axis."""


class PipelineChannels:
    """The channels that begin or end at this rank. Make it with `create`."""

    def __init__(self, context: ParallelContext) -> None:
        self._context = context
        self._ranks = context.view("activation").group("pipeline", context.rank)
        self._in_flight: dict[Channel, deque[Pending]] = {}

    @classmethod
    def create(cls, context: ParallelContext, channels: Iterable[Channel]) -> PipelineChannels:
        """Connect the ranks of every pipeline; collective: all ranks of the job call it with equal arguments.

        Two objects of one context may share their process groups: `wait_for_sends` before using the other.
        """
        result = cls(context)
        pipelines = context.view("activation").groups("pipeline")
        for channel in sorted(channels):
            sender, receiver, _ = channel
            for ranks in pipelines:
                pair = ranks[sender], ranks[receiver]
                context.make_named_group((*pair, channel[2]), pair)
            # NCCL connects at a group's first use, and the host waits for the peer meanwhile. Here all meet in one
            # order; in a step one rank may post a receive long before the other sends, and both would wait for ever.
            place = context.index("pipeline")
            if place == sender:
                result.send(channel, torch.zeros(1, device=context.device))
                result.wait_for_sends()
            elif place == receiver:
                result.receive(channel, torch.zeros(1, device=context.device)).wait()
        return result

    def send(self, channel: Channel, tensor: Tensor, max_in_flight: int = 1) -> None:
        """Start sending a contiguous tensor, which must not change any more; it is kept alive while it travels.

        Args:
            max_in_flight: with more tensors than this under way on the channel, wait for the oldest. The caller knows
                that the peer has asked for that one by then.
        """
        work = dist.isend(tensor, dst=self._ranks[channel[1]], group=self._group(channel))
        assert work is not None
        queue = self._in_flight.setdefault(channel, deque())
        queue.append(Pending(tensor, work))
        while queue and (len(queue) > max_in_flight or queue[0].is_completed()):
            queue.popleft().wait()

    def receive(self, channel: Channel, buffer: Tensor) -> Pending:
        """Start receiving into a contiguous tensor of the shape and dtype that the peer sends."""
        work = dist.irecv(buffer, src=self._ranks[channel[0]], group=self._group(channel))
        assert work is not None
        return Pending(buffer, work)

    def wait_for_sends(self) -> None:
        """Return when all that was sent has left."""
        for queue in self._in_flight.values():
            while queue:
                queue.popleft().wait()

    def _group(self, channel: Channel) -> dist.ProcessGroup:
        sender, receiver, carries = channel
        return self._context.named_group((self._ranks[sender], self._ranks[receiver], carries))
