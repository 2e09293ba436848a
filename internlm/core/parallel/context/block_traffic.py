"""Sends and receives of the blocks of a plan: keys and values one way, their gradients the other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from internlm.core.communication.pending import Pending
from internlm.core.parallel.context.attention_plan import AttentionPlan, BlockMessage, Rows, num_rows


class ContextGroups(NamedTuple):
    """The process groups of the ranks that share a sample.

    NCCL runs the messages of a group in order, so gradients have a group of their own.

    Attributes:
        keys: for keys and values.
        gradients: of the same ranks, for their gradients.
    """

    keys: dist.ProcessGroup
    gradients: dist.ProcessGroup


class _Arriving(NamedTuple):
    message: BlockMessage
    block: Pending


class _Traffic:
    """Messages of one kind, in one pass over a layer.

    Args:
        plan: of this rank.
        group: of the context ranks.
        like: has the trailing dimensions, the dtype and the device of blocks.
    """

    def __init__(self, plan: AttentionPlan, group: dist.ProcessGroup, like: Tensor) -> None:
        self._plan = plan
        self._group = group
        self._like = like
        self._arriving: dict[int, list[_Arriving]] = defaultdict(list)
        self._sending: list[Pending] = []

    def _start(self, sends: Sequence[tuple[BlockMessage, Tensor]], receives: Sequence[BlockMessage]) -> None:
        if not sends and not receives:
            return
        operations, buffers = [], []
        for message, block in sends:
            operations.append(dist.P2POp(dist.isend, block, group=self._group, group_peer=message.peer))
            buffers.append(block)
        for message in receives:
            block = self._like.new_empty((num_rows(self._plan.rows_of(message)), *self._like.shape[1:]))
            operations.append(dist.P2POp(dist.irecv, block, group=self._group, group_peer=message.peer))
            buffers.append(block)
        works = dist.batch_isend_irecv(operations)
        # NCCL returns one work for all operations, Gloo one for each.
        pending = [Pending(block, works[min(i, len(works) - 1)]) for i, block in enumerate(buffers)]
        self._sending += pending[: len(sends)]
        for message, arriving in zip(receives, pending[len(sends) :], strict=True):
            self._arriving[message.arrival].append(_Arriving(message, arriving))

    def _arrived(self, step: int) -> list[tuple[BlockMessage, Tensor]]:
        return [(message, block.wait()) for message, block in self._arriving.pop(step, ())]

    def _wait_for_sends(self) -> None:
        for pending in self._sending:
            pending.wait()


class KeyTraffic(_Traffic):
    """Keys and values of other ranks, as they come and go.

    Args:
        plan: of this rank.
        group: of the context ranks.
        own: this rank's block, contiguous `[S, ...]`.
    """

    def __init__(self, plan: AttentionPlan, group: dist.ProcessGroup, own: Tensor) -> None:
        super().__init__(plan, group, own)
        self._blocks = {plan.rank: own}

    def begin_step(self, number: int) -> None:
        """Wait for the blocks that this step needs, and start the messages of the step."""
        step = self._plan.steps[number]
        for message, block in self._arrived(number):
            self._blocks[message.source] = block
        sends = []
        for message in step.key_sends:
            block = self._blocks[message.source]
            is_own = message.source == self._plan.rank
            sends.append((message, take_rows(block, self._plan.rows_of(message)) if is_own else block))
        self._start(sends, step.key_receives)

    def block(self, source: int) -> Tensor:
        """The rows of a rank's block that this rank holds; all of its own."""
        return self._blocks[source]

    def end_step(self, number: int) -> None:
        """Release the blocks that no later step needs."""
        for source in self._plan.released[number]:
            del self._blocks[source]

    def finish(self) -> None:
        """Wait until everything has been sent."""
        self._wait_for_sends()


class GradientTraffic(_Traffic):
    """Gradients of keys and values, summed on their way home.

    Args:
        plan: of this rank.
        group: of the context ranks.
        own: sum of the gradients of this rank's block, `[S, ...]`; added to.
    """

    def __init__(self, plan: AttentionPlan, group: dist.ProcessGroup, own: Tensor) -> None:
        super().__init__(plan, group, own)
        self._sums = {plan.rank: own}

    def sum_of(self, source: int) -> Tensor:
        """The gradients of a rank's block that this rank has; add to it."""
        if source not in self._sums:
            rows = num_rows(self._plan.rows_held(source))
            self._sums[source] = self._like.new_zeros((rows, *self._like.shape[1:]))
        return self._sums[source]

    def begin_step(self, number: int) -> None:
        """Add what arrives before this step."""
        for message, block in self._arrived(number):
            own_sum = self.sum_of(message.source)
            if message.source == self._plan.rank:
                add_rows(own_sum, self._plan.rows_of(message), block)
            else:
                own_sum.add_(block)

    def end_step(self, number: int) -> None:
        """Start the messages of a step."""
        step = self._plan.steps[number]
        sends = []
        for message in step.gradient_sends:
            sends.append((message, self.sum_of(message.source)))
            del self._sums[message.source]
        self._start(sends, step.gradient_receives)

    def finish(self) -> None:
        """Add what arrives behind the last step, and wait until everything has been sent."""
        for number in sorted(self._arriving):
            self.begin_step(number)
        self._wait_for_sends()


def take_rows(block: Tensor, rows: Rows) -> Tensor:
    """Rows of `[S, ...]`, contiguous; a view if they are one range."""
    parts = [block[start:stop] for start, stop in rows]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def add_rows(total: Tensor, rows: Rows, block: Tensor) -> None:
    """Add the rows of a block to those of `total`."""
    for (start, stop), part in zip(rows, block.split([stop - start for start, stop in rows]), strict=True):
        total[start:stop] += part
