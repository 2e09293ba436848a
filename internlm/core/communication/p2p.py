"""Asynchronous sends and receives between the ranks of a pipeline.

Each channel, from one rank to another for one kind of tensor, has its own process group: NCCL executes the operations
of a group in order, so that in a shared group a receive that waits for its peer would block every later send. On a
channel, each side has only one kind of operation. Tensors are untagged and arrive in the order in which they were sent.
This module knows no schedule: the caller decides what is sent when.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from internlm.core.communication.pending import Pending
from internlm.core.context.parallel_context import ParallelContext


class Channel(NamedTuple):
    """A one-way connection between two ranks of a pipeline, on which tensors keep their order.

    Attributes:
        sender, receiver: indices along the pipeline axis.
        kind: of the tensors, "activation" or "gradient".
    """

    sender: int
    receiver: int
    kind: str


class PipelineChannels:
    """The channels that begin or end at this rank. Use `create` to make one."""

    def __init__(self, context: ParallelContext) -> None:
        self._context = context
        self._ranks = context.view("activation").group("pipeline", context.rank)
        self._in_flight: dict[Channel, deque[Pending]] = {}

    @classmethod
    def create(cls, context: ParallelContext, channels: Iterable[Channel]) -> PipelineChannels:
        """Connect the ranks of every pipeline; collective: all ranks of the job call it with equal arguments.

        Two objects of one context share process groups: call `wait_for_sends` before using the other one.
        """
        result = cls(context)
        pipelines = context.view("activation").groups("pipeline")
        for channel in sorted(channels):
            sender, receiver, kind = channel
            for ranks in pipelines:
                pair = ranks[sender], ranks[receiver]
                context.make_named_group((*pair, kind), pair)
            # NCCL connects at the first use of a group, and the host waits for its peer meanwhile. Here all ranks use
            # the groups in one order; in a step, a rank may post a receive long before its peer sends: a deadlock.
            stage = context.index("pipeline")
            if stage == sender:
                result.send(channel, torch.zeros(1, device=context.device))
                result.wait_for_sends()
            elif stage == receiver:
                result.receive(channel, torch.zeros(1, device=context.device)).wait()
        return result

    def send(self, channel: Channel, tensor: Tensor, max_in_flight: int = 1) -> None:
        """Start sending a contiguous tensor, which must not change afterwards; it is kept alive until it is sent.

        Args:
            channel: begins at this rank.
            tensor: of the shape and dtype that the peer expects.
            max_in_flight: tensors on the channel above which to wait for the oldest. The caller guarantees that the
                peer has posted its receive by then.
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
        """Wait until every tensor has been sent."""
        for queue in self._in_flight.values():
            while queue:
                queue.popleft().wait()

    def _group(self, channel: Channel) -> dist.ProcessGroup:
        sender, receiver, kind = channel
        return self._context.named_group((self._ranks[sender], self._ranks[receiver], kind))
