"""Parameters that never had a gradient: weight decay must not shrink what nobody trains.

A parameter without a gradient in one step counts as having a zero gradient then, whatever the layout; that is what its
gradient is. Only one that had none since the start of the run, on no rank, is left as it is, like torch.optim does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from internlm.core.communication.collectives import all_reduce
from internlm.solver.optimizer.bucket import Bucket


class UnusedParameters:
    """Keeps the masters of unused parameters.

    All ranks that share a bucket agree on which parameters are unused. Usually none is after the first step, and no
    message is sent any more; while there is one, a step waits for the device.

    Args:
        buckets: of the optimizer.
        second_moment: of a bucket's masters; in a resumed run it shows which parameters were used before.
    """

    def __init__(self, buckets: Sequence[Bucket], second_moment: Callable[[Bucket], Tensor]) -> None:
        self._buckets = buckets
        self._second_moment = second_moment
        self._unused = [list(range(len(bucket.parameters))) for bucket in buckets]

    def update(self) -> None:
        """Strike out parameters that got a gradient in this step; call it in every step, before the update."""
        for number, bucket in enumerate(self._buckets):
            unused = self._unused[number]
            if not unused:
                continue
            was_used = torch.stack([self._was_used(bucket, index) for index in unused])
            for group in (bucket.groups.zero, bucket.groups.replica, *bucket.groups.partial):
                all_reduce(was_used, group, dist.ReduceOp.MAX)
            self._unused[number] = [i for i, used in zip(unused, was_used.tolist(), strict=True) if not used]

    def _was_used(self, bucket: Bucket, index: int) -> Tensor:
        if bucket.has_grad[index]:
            return torch.ones((), device=bucket.master.device)
        return self._second_moment(bucket)[bucket.range_in_shard(index)].any().float()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Inside, masters may change; afterwards those of unused parameters are what they were."""
        masters = [
            bucket.master.detach()[bucket.range_in_shard(index)]
            for bucket, unused in zip(self._buckets, self._unused, strict=True)
            for index in unused
        ]
        copies = [master.clone() for master in masters]
        yield
        for master, copy in zip(masters, copies, strict=True):
            master.copy_(copy)
