"""Scales of weights that are split over ranks, for gathering them in float8."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from internlm.core.communication.collectives import all_reduce
from internlm.model.ops.float8.scaled_gemm import FORWARD_FORMAT, amax_of, scale_of


class WeightScales:
    """The scale of each full weight, computed in its first gather of a step and cached for the others.

    One small all-reduce serves a set of weights that are gathered together. Repeated in every gather, it would have to
    wait for the prefetches launched before it.
    """

    def __init__(self) -> None:
        self._scales: dict[Hashable, tuple[Tensor, ...]] = {}

    def of(
        self, key: Hashable, weights: Sequence[Sequence[Tensor]], groups: Sequence[dist.ProcessGroup | None]
    ) -> tuple[Tensor, ...]:
        """The scales of some weights.

        Args:
            key: of these weights.
            weights: this rank's part of each, which may be empty and may be held as several tensors.
            groups: over whose ranks the weights are split, one group after the other.
        """
        if key not in self._scales:
            amaxes = torch.stack([_amax_of(shards) for shards in weights])
            for group in groups:
                all_reduce(amaxes, group, dist.ReduceOp.MAX)
            self._scales[key] = scale_of(amaxes, FORWARD_FORMAT).unbind()
        return self._scales[key]

    def forget(self) -> None:
        """Drop the cache as the weights change; to be called on all ranks at the same point."""
        self._scales.clear()


def _amax_of(shards: Sequence[Tensor]) -> Tensor:
    filled = [shard for shard in shards if shard.numel()]
    return amax_of(*filled) if filled else torch.zeros((), device=shards[0].device)
