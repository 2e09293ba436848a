"""Parameters that every data rank holds whole, laid out flat and updated in shares: ZeRO stage 1."""

from __future__ import annotations

import torch
from torch import nn

from internlm.core.communication.collectives import Done, Work, all_gather_async
from internlm.solver.optimizer.bucket import Bucket
from internlm.solver.optimizer.bucket_groups import BucketGroups, BucketKind


class FlatBucket(Bucket):
    """A bucket whose parameters become views of one flat buffer of their dtype, `parameter_buffer`.

    Every rank of the zero group updates its slice, `parameter_shard`; an all-gather brings the others'.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        kind: BucketKind,
        groups: BucketGroups,
        reduce_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(parameters, kind, groups, reduce_dtype)
        self.parameter_buffer = torch.zeros(self.numel, dtype=kind.dtype, device=self.grad_buffer.device)
        for parameter, view in zip(parameters, self.views(self.parameter_buffer), strict=True):
            view.copy_(parameter.detach())
            parameter.data = view
        self.parameter_shard = self.parameter_buffer[self.shard_start : self.shard_stop]
        # fp32 parameters are their own master copy.
        self.master = nn.Parameter(self.parameter_shard.float() if kind.has_master else self.parameter_shard)
        self._gathering: Work = Done()

    @torch.no_grad()
    def start_gathering(self) -> None:
        """Write the masters back into the parameters and start collecting the other ranks' shares."""
        if self.kind.has_master:
            self.parameter_shard.copy_(self.master)
        if self.groups.zero is not None:
            self._gathering = all_gather_async(self.parameter_buffer, self.parameter_shard.clone(), self.groups.zero)

    def finish_gathering(self) -> None:
        """Wait until every parameter holds the updated weights."""
        self._gathering.wait()
        self._gathering = Done()

    @torch.no_grad()
    def reset_master(self) -> None:
        """Take the masters anew from the parameters, after somebody else wrote the parameters."""
        if self.kind.has_master:
            self.master.copy_(self.parameter_shard)
