"""Parameters that never had a gradient: weight decay must not shrink what nobody trains.

A parameter without a gradient in one step counts as having a zero gradient then, whatever the layout; that is what its
gradient is. Only one that had none since the start of the run, on no rank, is left as it is, like torch.optim does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from internlm.core.communication.collectives import all_reduce
from internlm.solver.optimizer.bucket import ALIGNMENT
from internlm.solver.optimizer.shard_state import ShardState


class UnusedParameters:
    """Knows which parameters are unused.

    All ranks that share a bucket agree on them. Usually none is after the first step, and no message is sent any more;
    while there is one, a step waits for the device.

    Args:
        states: of all buckets; in a resumed run the second moments show which parameters were used before.
    """

    def __init__(self, states: Sequence[ShardState]) -> None:
        self._states = states
        self._unused = [list(range(len(state.bucket.parameters))) for state in states]

    def update(self) -> None:
        """Strike out parameters that got a gradient in this step; call it in every step, before the update."""
        for number, state in enumerate(self._states):
            unused = self._unused[number]
            if not unused:
                continue
            was_used = torch.stack([_was_used(state, index) for index in unused])
            groups = state.bucket.groups
            for group in (groups.zero, groups.replica, *groups.partial):
                all_reduce(was_used, group, dist.ReduceOp.MAX)
            self._unused[number] = [i for i, used in zip(unused, was_used.tolist(), strict=True) if not used]

    def used_parts(self) -> list[tuple[ShardState, list[slice]]]:
        """Of every shard, what lies between the unused parameters. Each part starts and ends aligned."""
        return [(state, _between(state, unused)) for state, unused in zip(self._states, self._unused, strict=True)]


def _was_used(state: ShardState, index: int) -> Tensor:
    bucket = state.bucket
    if bucket.has_grad[index]:
        return torch.ones((), device=bucket.grad_shard.device)
    return state.exp_avg_sq[bucket.range_in_shard(index)].any().float().to(bucket.grad_shard.device)


def _between(state: ShardState, unused: Sequence[int]) -> list[slice]:
    bucket = state.bucket
    parts, start, end = [], 0, bucket.shard_stop - bucket.shard_start
    for hole in sorted((bucket.range_in_shard(index) for index in unused), key=lambda hole: hole.start):
        if hole.start > start:
            parts.append(slice(start, hole.start))
        # Behind a parameter there is nothing until the next one starts.
        start = max(start, min(end, -(-hole.stop // ALIGNMENT) * ALIGNMENT))
    return [*parts, slice(start, end)] if start < end else parts
