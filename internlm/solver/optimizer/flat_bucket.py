"""Replicated parameters in a flat buffer, of which each rank updates a slice: ZeRO stage 1."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from internlm.core.communication.collectives import all_gather_async
from internlm.core.communication.pending import Pending
from internlm.solver.optimizer.bucket import Bucket
from internlm.solver.optimizer.bucket_groups import BucketGroups, BucketKind
from internlm.solver.optimizer.state_form import FP32_STATE, StateForm, master_dtype


class FlatBucket(Bucket):
    """A bucket whose parameters become views of one flat buffer of their dtype, `parameter_buffer`.

    Every rank of the zero group updates its slice, `parameter_shard`; an all-gather delivers the other slices.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        kind: BucketKind,
        groups: BucketGroups,
        reduce_dtype: torch.dtype = torch.float32,
        form: StateForm = FP32_STATE,
    ) -> None:
        super().__init__(parameters, kind, groups, reduce_dtype, form)
        self.parameter_buffer = torch.zeros(self.numel, dtype=kind.dtype, device=self.grad_buffer.device)
        for parameter, view in zip(parameters, self.views(self.parameter_buffer), strict=True):
            view.copy_(parameter.detach())
            parameter.data = view
        self.parameter_shard = self.parameter_buffer[self.shard_start : self.shard_stop]
        # fp32 and float64 parameters on the device of the state are their own masters.
        self.master = self.parameter_shard
        if form.has_master(kind.dtype):
            self.master = torch.empty_like(
                self.parameter_shard, dtype=master_dtype(kind.dtype), device=self.state_device
            )
            self.reset_master()
        self._gathering: Pending | None = None

    def write_back(self, part: slice, values: Tensor) -> None:
        """Write updated weights into this rank's slice of the buffer."""
        if self.master is not self.parameter_shard:
            self.parameter_shard[part].copy_(values, non_blocking=True)

    def flat_parameters(self, part: slice) -> Tensor | None:
        """This rank's slice of the buffer, unless it is the master itself."""
        return None if self.master is self.parameter_shard else self.parameter_shard[part]

    def start_gathering(self) -> None:
        """Start the all-gather of the other ranks' slices."""
        if self.groups.zero is not None:
            self._gathering = all_gather_async(self.parameter_buffer, self.parameter_shard.clone(), self.groups.zero)

    def finish_gathering(self) -> None:
        """Wait until every parameter holds the updated weights."""
        if self._gathering is not None:
            self._gathering.wait()
            self._gathering = None

    def reset_master(self) -> None:
        """Overwrite the masters with the parameters, after these were changed from outside."""
        if self.master is not self.parameter_shard:
            self.master.copy_(self.parameter_shard)
