"""Parameters of which every rank keeps only its rows, whose communication FSDP does: ZeRO stage 3."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from internlm.core.parallel.fsdp import local_tensor
from internlm.solver.optimizer.bucket import Bucket
from internlm.solver.optimizer.bucket_groups import BucketGroups, BucketKind


class FsdpBucket(Bucket):
    """A bucket over this rank's rows. FSDP has summed its gradients over the zero ranks when they arrive.

    The rows stay where FSDP keeps them, so that `master` is a copy, of fp32 parameters too.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        kind: BucketKind,
        groups: BucketGroups,
        reduce_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(parameters, kind, groups, reduce_dtype)
        self.master = nn.Parameter(torch.zeros_like(self.grad_shard))
        self._master_views = self.views(self.master.detach())
        self.reset_master()

    def accumulate(self, index: int, gradient: Tensor) -> None:
        """Add the summed gradient of this rank's rows of parameter `index`."""
        super().accumulate(index, local_tensor(gradient))

    def start_gathering(self) -> None:
        """Write the masters back into this rank's rows; FSDP gathers rows when a layer is called."""
        for parameter, view in zip(self.parameters, self._master_views, strict=True):
            local_tensor(parameter).copy_(view)

    def finish_gathering(self) -> None:
        """There is nothing to wait for."""

    def reset_master(self) -> None:
        """Take the masters anew from this rank's rows."""
        for parameter, view in zip(self.parameters, self._master_views, strict=True):
            view.copy_(local_tensor(parameter))
