"""Parameters of which every rank keeps only its rows, whose communication FSDP does: ZeRO stage 3."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from internlm.core.parallel.fsdp import local_tensor
from internlm.solver.optimizer.bucket import Bucket
from internlm.solver.optimizer.bucket_groups import BucketGroups, BucketKind
from internlm.solver.optimizer.state_form import FP32_STATE, StateForm, wide


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
        form: StateForm = FP32_STATE,
    ) -> None:
        super().__init__(parameters, kind, groups, reduce_dtype, form)
        self.master = torch.zeros_like(self.grad_shard, dtype=wide(kind.dtype), device=self.state_device)
        self._master_views = self.views(self.master)
        self.reset_master()

    def accumulate(self, index: int, gradient: Tensor) -> None:
        """Add the summed gradient of this rank's rows of parameter `index`."""
        super().accumulate(index, local_tensor(gradient))

    def start_reduction(self) -> None:
        """Nothing to start yet: what FSDP sums arrives on a stream of its own until the backward pass has ended."""
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
            held = self.range_in_shard(index)
            start, stop = max(held.start, part.start), min(held.stop, part.stop)
            if start < stop:
                rows = local_tensor(parameter).view(-1)[start - held.start : stop - held.start]
                rows.copy_(values[start - part.start : stop - part.start], non_blocking=True)

    def start_gathering(self) -> None:
        """There is nothing to start: FSDP gathers rows when a layer is called."""

    def finish_gathering(self) -> None:
        """There is nothing to wait for."""

    @torch.no_grad()
    def reset_master(self) -> None:
        """Take the masters anew from this rank's rows."""
        for parameter, view in zip(self.parameters, self._master_views, strict=True):
            view.copy_(local_tensor(parameter))
