"""Parameters that never had a gradient, which weight decay must not shrink.

A parameter without a gradient in one step has a zero gradient in that step, in every layout. Only a parameter that has
had none on any rank since the start of the run is left unchanged, as by torch.optim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from internlm.core.communication.collectives import all_reduce
from internlm.solver.optimizer.bucket import ALIGNMENT
from internlm.solver.optimizer.shard_state import ShardState


class UntrainedParameters:
    """Tracks which parameters are untrained.

    All ranks that share a bucket agree on them. After the first step there are usually none, which costs no
    communication; while there is one, every step waits for the device.

    Args:
        states: states of all buckets; in a resumed run they show which parameters were trained before.
    """

    def __init__(self, states: Sequence[ShardState]) -> None:
        self._states = states
        self._untrained = [list(range(len(state.bucket.parameters))) for state in states]

    def update(self) -> None:
        """Remove the parameters that received a gradient in this step; call it in every step, before the update."""
        for number, state in enumerate(self._states):
            untrained = self._untrained[number]
            if not untrained:
                continue
            was_trained = torch.stack([_was_trained(state, index) for index in untrained])
            groups = state.bucket.groups
            for group in (groups.zero, groups.replica, *groups.partial):
                all_reduce(was_trained, group, dist.ReduceOp.MAX)
            pairs = zip(untrained, was_trained.tolist(), strict=True)
            self._untrained[number] = [index for index, trained in pairs if not trained]

    def trained_parts(self) -> list[tuple[ShardState, list[slice]]]:
        """The ranges of every shard between untrained parameters, aligned at both ends."""
        return [
            (state, _between(state, untrained)) for state, untrained in zip(self._states, self._untrained, strict=True)
        ]


def _was_trained(state: ShardState, index: int) -> Tensor:
    bucket = state.bucket
    if bucket.has_grad[index]:
        return torch.ones((), device=bucket.grad_shard.device)
    own = bucket.range_in_shard(index)
    trained = state.rule.was_trained({name: tensor[own] for name, tensor in state.tensors.items()})
    return trained.float().to(bucket.grad_shard.device)


def _between(state: ShardState, untrained: Sequence[int]) -> list[slice]:
    bucket = state.bucket
    parts, start, end = [], 0, bucket.shard_stop - bucket.shard_start
    for hole in sorted((bucket.range_in_shard(index) for index in untrained), key=lambda hole: hole.start):
        if hole.start > start:
            parts.append(slice(start, hole.start))
        # The rest of a parameter's last aligned block is empty.
        start = max(start, min(end, -(-hole.stop // ALIGNMENT) * ALIGNMENT))
    return [*parts, slice(start, end)] if start < end else parts
