"""Scales of weights whose rows are split over ranks, for gathering them in float8."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from internlm.core.communication.collectives import all_reduce
from internlm.model.ops.float8 import FORWARD_FORMAT, amax_of, scale_of


class WholeScales:
    """The scale of each whole weight, computed in its first gather of a step and kept for the others.

    One small all-reduce for a set of weights that are gathered together. In every gather it would have to wait for the
    gathers that were started ahead of it.
    """

    def __init__(self) -> None:
        self._scales: dict[Hashable, tuple[Tensor, ...]] = {}

    def of(self, key: Hashable, shards: Sequence[Tensor], group: dist.ProcessGroup | None) -> tuple[Tensor, ...]:
        """The scales of some weights.

        Args:
            key: of these weights.
            shards: this rank's part of each; may be empty.
            group: the ranks that hold the other parts.
        """
        if key not in self._scales:
            amaxes = [amax_of(shard) if shard.numel() else torch.zeros((), device=shard.device) for shard in shards]
            joined = all_reduce(torch.stack(amaxes), group, dist.ReduceOp.MAX)
            self._scales[key] = scale_of(joined, FORWARD_FORMAT).unbind()
        return self._scales[key]

    def forget(self) -> None:
        """The weights change; to be called on all ranks at the same point."""
        self._scales.clear()
