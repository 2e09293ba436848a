"""A vocabulary split over the tensor ranks, as the loss sees it."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from internlm.core.communication.collectives import all_reduce
from internlm.core.context.parallel_context import ParallelContext


class VocabRanks:
    """This rank's classes of the vocabulary, and reductions over the ranks that hold the others.

    Attributes:
        start: this rank's first class.
        size: its classes; further rows of its weight are padding.
        total: classes of the whole vocabulary.
    """

    def __init__(self, context: ParallelContext, block: int, total: int) -> None:
        self._context = context
        self.total = total
        self.start = min(context.index("tensor") * block, total)
        self.size = min(block, total - self.start)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum in place over the ranks."""
        return all_reduce(tensor, self._context.group("tensor"))

    def max(self, tensor: Tensor) -> Tensor:
        """Largest value over the ranks, in place."""
        return all_reduce(tensor, self._context.group("tensor"), dist.ReduceOp.MAX)

    def min(self, tensor: Tensor) -> Tensor:
        """Smallest value over the ranks, in place."""
        return all_reduce(tensor, self._context.group("tensor"), dist.ReduceOp.MIN)
