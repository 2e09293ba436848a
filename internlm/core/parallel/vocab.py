"""The vocabulary split over the tensor ranks, as the loss uses it."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from internlm.core.communication.collectives import all_reduce
from internlm.core.context.parallel_context import ParallelContext


class VocabRanks:
    """This rank's token ids of the vocabulary, and reductions over the ranks that hold the others.

    Args:
        context: this rank's position and process groups.
        block: rows of the head's weight on each rank.
        total: size of the vocabulary.

    Attributes:
        start: this rank's first token id.
        size: number of its token ids; the remaining rows of its weight are padding.
        total: size of the vocabulary.
    """

    def __init__(self, context: ParallelContext, block: int, total: int) -> None:
        self._context = context
        self.total = total
        self.start = min(context.index("tensor") * block, total)
        self.size = min(block, total - self.start)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        return all_reduce(tensor, self._context.group("tensor"))

    def max(self, tensor: Tensor) -> Tensor:
        """Maximum over the ranks, in place."""
        return all_reduce(tensor, self._context.group("tensor"), dist.ReduceOp.MAX)

    def min(self, tensor: Tensor) -> Tensor:
        """Minimum over the ranks, in place."""
        return all_reduce(tensor, self._context.group("tensor"), dist.ReduceOp.MIN)
