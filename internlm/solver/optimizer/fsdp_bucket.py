"""Parameters sharded by rows, which FSDP gathers and whose gradients it reduces: ZeRO stage 3."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from internlm.core.parallel.fsdp import local_tensor
from internlm.solver.optimizer.bucket import Bucket
from internlm.solver.optimizer.bucket_groups import BucketGroups, BucketKind
from internlm.solver.optimizer.state_form import FP32_STATE, StateForm, master_dtype


class FsdpBucket(Bucket):
    """A bucket of this rank's rows, whose gradients arrive already summed over the zero ranks.

    FSDP owns the memory of the rows, so `master` is a copy even for fp32 parameters.
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
        self.master = torch.zeros_like(self.grad_shard, dtype=master_dtype(kind.dtype), device=self.state_device)
        self._master_views = self.views(self.master)
        self.reset_master()

    def accumulate(self, index: int, gradient: Tensor) -> None:
        """Add the summed gradient of this rank's rows of parameter `index`."""
        super().accumulate(index, local_tensor(gradient))

    def start_reduction(self) -> None:
        """Starts nothing yet: FSDP reduces gradients on its own stream until the end of backward."""
        self._is_reducing = True

    def continue_reduction(self) -> None:
        """See `start_reduction`."""

    def finish_reduction(self) -> None:
        """Sum over the replicas and further axes."""
        super().start_reduction()
        super().finish_reduction()

    def write_back(self, part: slice, values: Tensor) -> None:
        """Write updated weights into this rank's rows."""
        for index, parameter in enumerate(self.parameters):
            own = self.range_in_shard(index)
            start, stop = max(own.start, part.start), min(own.stop, part.stop)
            if start < stop:
                rows = local_tensor(parameter).view(-1)[start - own.start : stop - own.start]
                rows.copy_(values[start - part.start : stop - part.start], non_blocking=True)

    def start_gathering(self) -> None:
        """Does nothing: FSDP gathers rows when a layer is called."""

    def finish_gathering(self) -> None:
        """Does nothing; see `start_gathering`."""

    @torch.no_grad()
    def reset_master(self) -> None:
        """Overwrite the masters with this rank's rows."""
        for parameter, view in zip(self.parameters, self._master_views, strict=True):
            view.copy_(local_tensor(parameter))
