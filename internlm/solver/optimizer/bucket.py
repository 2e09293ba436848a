"""What all buckets share: flat gradients over some parameters, and an fp32 master shard of them.

One collective and one kernel then serve many tensors. How parameters are kept in step with the masters is what the
kinds of buckets differ in; see `flat_bucket` and `fsdp_bucket`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from internlm.core.communication.collectives import all_reduce, all_reduce_async, reduce_scatter_async
from internlm.core.communication.pending import Pending
from internlm.core.parallel.shard_spec import Box, shard_spec_of
from internlm.solver.optimizer.bucket_groups import BucketGroups, BucketKind
from internlm.solver.optimizer.state_form import FP32_STATE, StateForm, wide

# Rows over which a norm is summed in fp32; a single fp32 sum over millions of elements is wrong in the fourth digit.
NORM_ROW = 1024

# Tensors start at multiples of this many elements: vector loads stay aligned whatever the tensor's size.
ALIGNMENT = 32


def part_size(device: torch.device) -> int:
    """Elements of a flat tensor that are converted at once, so that no buffer ever exists in two dtypes.

    A multiple of `NORM_ROW`. On a device, launches should not outweigh the work. On the host, more than 32 MiB
    (M_MMAP_THRESHOLD of glibc) would be taken from the system anew each time.
    """
    return 2**22 if device.type == "cpu" else 2**24


class Bucket(ABC):
    """The gradients of a run of parameters in one flat buffer, and this rank's share of sums and masters.

    Rank z of the zero group owns the z-th equal slice of the buffer: its summed gradients are `grad_shard`, its fp32
    weights `master`. A subclass sets `master`.

    Attributes:
        parameters: of this bucket; each fills `shard_spec.local_shape` of the buffer.
        offsets: where each starts in the buffer.
        shard_start, shard_stop: this rank's slice of the buffer.
        grad_shard: `[shard_stop - shard_start]` in the dtype that the form says.
        master: fp32, of the shape of `grad_shard`, where the form says.
        has_grad: for each parameter, whether a gradient came in this step.
    """

    master: Tensor

    def __init__(
        self,
        parameters: list[nn.Parameter],
        kind: BucketKind,
        groups: BucketGroups,
        reduce_dtype: torch.dtype = torch.float32,
        form: StateForm = FP32_STATE,
    ) -> None:
        self.parameters = parameters
        self.kind = kind
        self.groups = groups
        grad_dtype = form.gradient_dtype(kind.dtype)
        # Buffers in bf16 are there to save memory, which a copy in fp32 for the way would undo; float64 to be exact.
        self.reduce_dtype = reduce_dtype if grad_dtype == torch.float32 else grad_dtype
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
        self.state_device = form.state_device(device)
        self.grad_buffer = torch.zeros(self.numel, dtype=grad_dtype, device=device)
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
            self.grad_shard = torch.zeros(slice_size, dtype=grad_dtype, device=device)
        self.has_grad = [False] * len(parameters)
        self._missing = [0] * len(parameters)
        self._num_incomplete = 0
        self._is_reducing = False
        self._reduction = Pending(self.grad_shard)

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
        self.has_grad = [False] * len(self.parameters)
        self._missing = list(num_gradients)
        self._num_incomplete = len(self._missing)
        self._is_reducing = False

    @property
    def is_complete(self) -> bool:
        """Whether every parameter got all its gradients."""
        return self._num_incomplete == 0

    def accumulate(self, index: int, gradient: Tensor) -> None:
        """Add a gradient of parameter `index`, of its local shape and any dtype, to the buffer.

        Raises:
            RuntimeError: the bucket is being reduced already, as more gradients came than were expected.
        """
        if self._is_reducing:
            raise RuntimeError(
                f'a gradient of "{self.specs[index].name}" came after its reduction had begun: it gets more gradients '
                f"a backward pass than one for each chunk that holds it; set overlap_sync_grad=False"
            )
        if self.has_grad[index]:
            self.grad_views[index].add_(gradient)
        else:
            self.grad_views[index].copy_(gradient)
            self.has_grad[index] = True
        self._missing[index] -= 1
        self._num_incomplete -= self._missing[index] == 0

    def start_reduction(self) -> None:
        """Start summing gradients over the zero group, or over the replicas where there is none.

        Every rank of the groups must call this, `continue_reduction` and `finish_reduction` of all buckets in the same
        order.
        """
        self._is_reducing = True
        self._fill_gaps()
        is_sent_as_it_is = self.reduce_dtype == self.grad_buffer.dtype or self.groups.are_trivial
        if self.groups.zero is None:
            reduced = self.grad_shard if is_sent_as_it_is else self.grad_shard.to(self.reduce_dtype)
            self._reduction = all_reduce_async(reduced, self.groups.replica)
            return
        sent, reduced = self.grad_buffer, self.grad_shard
        if not is_sent_as_it_is:
            sent = sent.to(self.reduce_dtype)
            reduced = torch.empty_like(self.grad_shard, dtype=self.reduce_dtype)
        self._reduction = reduce_scatter_async(reduced, sent, self.groups.zero)

    def continue_reduction(self) -> None:
        """Start summing over the replicas what the zero group has summed; later than `start_reduction`, as it waits."""
        if self.groups.zero is not None and self.groups.replica is not None:
            self._reduction = all_reduce_async(self._reduction.wait(), self.groups.replica)

    def finish_reduction(self) -> None:
        """Wait until `grad_shard` holds the sum over all ranks that contribute to it; after the last backward pass."""
        reduced = self._reduction.wait()
        self._reduction = Pending(self.grad_shard)
        # Not earlier: the other end of a pipeline gets there when this rank has sent on its last gradient.
        for group in self.groups.partial:
            all_reduce(reduced, group)
        if reduced is not self.grad_shard:
            self.grad_shard.copy_(reduced)

    def _fill_gaps(self) -> None:
        """No gradient, and none of what lies outside of the model, is a gradient of zero."""
        for view, has_grad in zip(self.grad_views, self.has_grad, strict=True):
            if not has_grad:
                view.zero_()
        for region in self._padding:
            region.zero_()

    def squared_grad_norm(self) -> Tensor:
        """Sum of the squares of `grad_shard`, a scalar fp64 tensor."""
        rows = [
            torch.linalg.vector_norm(part.view(-1, NORM_ROW), dim=1, dtype=wide(part.dtype))
            for part in self.grad_shard.split(part_size(self.grad_shard.device))
        ]
        return torch.cat(rows).double().square().sum()

    # -- parameters -----------------------------------------------------------------------------------------------

    @property
    def needs_gathering(self) -> bool:
        """Whether readers of the parameters must wait for an all-gather."""
        return self.groups.zero is not None

    @abstractmethod
    def write_back(self, part: slice, values: Tensor) -> None:
        """Write updated weights into the parameters, without waiting for a copy between devices to end.

        Args:
            part: which elements of the shard.
            values: of `master` there, in any dtype and on any device.
        """

    @abstractmethod
    def start_gathering(self) -> None:
        """Start collecting what other ranks have written back."""

    @abstractmethod
    def finish_gathering(self) -> None:
        """Wait until every parameter holds the updated weights."""

    @abstractmethod
    def reset_master(self) -> None:
        """Take the masters anew from the parameters, after somebody else wrote the parameters."""

    def range_in_shard(self, index: int) -> slice:
        """Which elements of `master` are parameter `index`; empty when this rank's slice holds none of it."""
        start = self.offsets[index]
        stop = start + self.grad_views[index].numel()
        size = self.shard_stop - self.shard_start
        return slice(
            min(max(start - self.shard_start, 0), size),
            min(max(stop - self.shard_start, 0), size),
        )

    def pieces(self, shard: Tensor, start: int = 0) -> Iterator[tuple[nn.Parameter, list[tuple[Box, Tensor]]]]:
        """For each parameter of this bucket, the boxes of it that a flat tensor laid out like `master` holds.

        Args:
            shard: a flat tensor, for example `master` or a moment of it, or a part of one.
            start: the element of `master` that is the first of `shard`.

        Yields:
            (parameter, [(box, view of `shard` with the box's shape)]); the list is empty when `shard` holds nothing of
            the parameter.
        """
        for index, parameter in enumerate(self.parameters):
            spec, view = self.specs[index], self.grad_views[index]
            held = self.range_in_shard(index)
            own = slice(max(held.start - start, 0), min(held.stop - start, shard.numel()))
            if own.start >= own.stop:
                yield parameter, []
                continue
            # Where `shard` begins, in elements of this parameter.
            origin = self.shard_start + start - self.offsets[index]
            # A virtual whole-tensor view of the flat shard: boxes address it in the parameter's own coordinates.
            strides = view.stride()
            pieces = []
            for box in spec.boxes_of_flat_range(origin + own.start, origin + own.stop):
                position = sum(index * stride for index, stride in zip(box.local_offset, strides, strict=True))
                piece = shard.as_strided(box.size, strides, position - origin + shard.storage_offset())
                pieces.append((box, piece))
            yield parameter, pieces
