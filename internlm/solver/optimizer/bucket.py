"""What all buckets share: flat fp32 gradients over some parameters, and an fp32 master shard of them.

One collective and one kernel then serve many tensors. How parameters are kept in step with the masters is what the
kinds of buckets differ in; see `flat_bucket` and `fsdp_bucket`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from internlm.core.communication.collectives import Done, Work, all_reduce, reduce_scatter_async
from internlm.core.parallel.shard_spec import Box, shard_spec_of
from internlm.solver.optimizer.bucket_groups import BucketGroups, BucketKind

# Rows over which a norm is summed in fp32; a single fp32 sum over millions of elements is wrong in the fourth digit.
NORM_ROW = 1024

# Tensors start at multiples of this many elements: vector loads stay aligned whatever the tensor's size.
ALIGNMENT = 32


class Bucket(ABC):
    """The gradients of a run of parameters in one flat fp32 buffer, and this rank's share of sums and masters.

    Rank z of the zero group owns the z-th equal slice of the buffer: its summed gradients are `grad_shard`, its fp32
    weights `master`. A subclass sets `master`.

    Attributes:
        parameters: of this bucket; each fills `shard_spec.local_shape` of the buffer.
        offsets: where each starts in the buffer.
        shard_start, shard_stop: this rank's slice of the buffer.
        grad_shard: fp32 `[shard_stop - shard_start]`.
        master: fp32, like `grad_shard`.
    """

    master: nn.Parameter

    def __init__(
        self,
        parameters: list[nn.Parameter],
        kind: BucketKind,
        groups: BucketGroups,
        reduce_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.parameters = parameters
        self.kind = kind
        self.groups = groups
        self.reduce_dtype = reduce_dtype
        self.specs = [shard_spec_of(parameter) for parameter in parameters]
        self.offsets: list[int] = []
        end = 0
        for spec in self.specs:
            self.offsets.append(end)
            end += -(-math.prod(spec.local_shape) // ALIGNMENT) * ALIGNMENT
        # A bucket is never empty, though all its parameters may be: FSDP leaves some ranks without a row.
        slice_size = max(1, -(-end // (groups.zero_size * NORM_ROW))) * NORM_ROW
        self.shard_start = groups.zero_index * slice_size
        self.shard_stop = self.shard_start + slice_size
        self.numel = slice_size * groups.zero_size

        device = parameters[0].device
        self.grad_buffer = torch.zeros(self.numel, dtype=torch.float32, device=device)
        self.grad_views = self.views(self.grad_buffer)
        # Local elements outside of every box (padding of the vocabulary) are no part of the model.
        self._padding = [
            view[tuple(slice(start, start + size) for start, size in zip(*rectangle, strict=True))]
            for view, spec in zip(self.grad_views, self.specs, strict=True)
            for rectangle in spec.padding()
        ]
        if groups.zero is None:
            self.grad_shard = self.grad_buffer
        else:
            self.grad_shard = torch.zeros(slice_size, dtype=torch.float32, device=device)
        self._has_grad = [False] * len(parameters)
        self._missing = [0] * len(parameters)
        self._is_reducing = False
        self._reduction: Work = Done()
        self._reduced: Tensor = self.grad_shard

    def views(self, buffer: Tensor) -> list[Tensor]:
        """A buffer of `numel` elements as one tensor a parameter, each of its local shape."""
        return [
            buffer[offset : offset + math.prod(spec.local_shape)].view(spec.local_shape)
            for offset, spec in zip(self.offsets, self.specs, strict=True)
        ]

    # -- gradients ------------------------------------------------------------------------------------------------

    def begin_step(self, num_gradients: Sequence[int]) -> None:
        """Forget the gradients of the step before.

        Args:
            num_gradients: for each parameter, after how many gradients it is complete.
        """
        self._has_grad = [False] * len(self.parameters)
        self._missing = list(num_gradients)
        self._is_reducing = False

    @property
    def is_complete(self) -> bool:
        """Whether every parameter got all its gradients."""
        return all(missing <= 0 for missing in self._missing)

    def accumulate(self, index: int, gradient: Tensor) -> None:
        """Add a gradient of parameter `index`, of its local shape and any dtype, to the fp32 buffer.

        Raises:
            RuntimeError: the bucket is being reduced already, as more gradients came than were expected.
        """
        if self._is_reducing:
            raise RuntimeError(
                f'a gradient of "{self.specs[index].name}" came after its reduction had begun: it gets more gradients '
                f"a backward pass than one for each chunk that holds it; set overlap_sync_grad=False"
            )
        if self._has_grad[index]:
            self.grad_views[index].add_(gradient)
        else:
            self.grad_views[index].copy_(gradient)
            self._has_grad[index] = True
        self._missing[index] -= 1

    def start_reduction(self) -> None:
        """Start summing gradients over the zero group; every rank of it must call this, in the same order."""
        self._is_reducing = True
        for view, has_grad in zip(self.grad_views, self._has_grad, strict=True):
            if not has_grad:
                view.zero_()
        for region in self._padding:
            region.zero_()
        if self.groups.zero is None:
            return
        if self.reduce_dtype == torch.float32:
            self._reduction = reduce_scatter_async(self.grad_shard, self.grad_buffer, self.groups.zero)
        else:
            self._reduced = torch.empty_like(self.grad_shard, dtype=self.reduce_dtype)
            self._reduction = reduce_scatter_async(
                self._reduced, self.grad_buffer.to(self.reduce_dtype), self.groups.zero
            )

    def finish_reduction(self) -> None:
        """Wait until `grad_shard` holds the sum over all ranks that contribute to it."""
        self._reduction.wait()
        self._reduction = Done()
        if self._reduced is not self.grad_shard:
            self.grad_shard.copy_(self._reduced)
            self._reduced = self.grad_shard
        for group in (self.groups.replica, *self.groups.partial):
            if group is None:
                continue
            if self.reduce_dtype == torch.float32:
                all_reduce(self.grad_shard, group)
            else:
                self.grad_shard.copy_(all_reduce(self.grad_shard.to(self.reduce_dtype), group))

    def squared_grad_norm(self) -> Tensor:
        """Sum of the squares of `grad_shard`, a scalar fp64 tensor."""
        rows = torch.linalg.vector_norm(self.grad_shard.view(-1, NORM_ROW), dim=1)
        return rows.double().square().sum()

    # -- parameters -----------------------------------------------------------------------------------------------

    @property
    def needs_gathering(self) -> bool:
        """Whether readers of the parameters must wait for an all-gather."""
        return self.groups.zero is not None

    @abstractmethod
    def start_gathering(self) -> None:
        """Write the masters back into the parameters and start collecting what other ranks updated."""

    @abstractmethod
    def finish_gathering(self) -> None:
        """Wait until every parameter holds the updated weights."""

    @abstractmethod
    def reset_master(self) -> None:
        """Take the masters anew from the parameters, after somebody else wrote the parameters."""

    def pieces(self, shard: Tensor) -> Iterator[tuple[nn.Parameter, list[tuple[Box, Tensor]]]]:
        """For each parameter of this bucket, the boxes of it that a flat tensor laid out like `master` holds.

        Args:
            shard: fp32 `[shard_stop - shard_start]`, for example `master` or a moment of it.

        Yields:
            (parameter, [(box, view of `shard` with the box's shape)]); the list is empty when this rank's slice holds
            nothing of the parameter.
        """
        for parameter, spec, offset, view in zip(
            self.parameters, self.specs, self.offsets, self.grad_views, strict=True
        ):
            start = max(offset, self.shard_start)
            stop = min(offset + view.numel(), self.shard_stop)
            # A virtual whole-tensor view of the flat shard: boxes address it in the parameter's own coordinates.
            strides = view.stride()
            pieces = []
            for box in spec.boxes_of_flat_range(start - offset, stop - offset):
                position = sum(index * stride for index, stride in zip(box.local_offset, strides, strict=True))
                piece = shard.as_strided(
                    box.size, strides, offset + position - self.shard_start + shard.storage_offset()
                )
                pieces.append((box, piece))
            yield parameter, pieces
