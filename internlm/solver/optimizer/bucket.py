"""The base class of buckets: flat gradients of several parameters, and an fp32 shard of their masters.

One collective and one kernel then process many tensors. Subclasses (`flat_bucket`, `fsdp_bucket`) differ in how updated
masters reach the parameters.
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
from internlm.solver.optimizer.state_form import FP32_STATE, StateForm, master_dtype
from internlm.utils.triton_support import why_no_triton

# Rows over which a norm is summed in fp32; a single fp32 sum over millions of elements is wrong in the fourth digit.
NORM_ROW = 1024

# Tensors start at multiples of this many elements: vector loads stay aligned whatever the tensor's size.
ALIGNMENT = 32


_MIN_KERNEL_NUMEL = 1 << 20
"""Smallest gradient that a Triton kernel accumulates: for smaller ones its launch takes longer than PyTorch's."""


def part_size(device: torch.device) -> int:
    """Number of elements of a flat tensor that are converted at a time, so that no whole buffer exists in two dtypes.

    A multiple of `NORM_ROW`. On a device, parts are large enough to amortize kernel launches. On the host, allocations
    above 32 MiB (glibc's largest M_MMAP_THRESHOLD) would be mapped anew each time.
    """
    return 2**22 if device.type == "cpu" else 2**24


def _is_accumulated_by_kernel(view: Tensor, gradient: Tensor) -> bool:
    """Whether a Triton kernel adds `gradient` to `view`: where the dtypes differ, PyTorch's is half as fast."""
    return (
        view.is_cuda
        and gradient.dtype != view.dtype
        and view.numel() >= _MIN_KERNEL_NUMEL
        and torch.float64 not in (gradient.dtype, view.dtype)
        and gradient.is_contiguous()
        and why_no_triton(view.device) is None
    )


class Bucket(ABC):
    """The gradients of several parameters in one flat buffer, and this rank's shard of reduced gradients and masters.

    Rank z of the zero group owns the z-th equal slice of the buffer: its summed gradients are `grad_shard`, its fp32
    weights `master`. A subclass sets `master`.

    Attributes:
        parameters: parameters of this bucket; each occupies its `ShardSpec.local_shape` of the buffer.
        offsets: first element of each parameter in the buffer.
        shard_start: first element of this rank's slice of the buffer.
        shard_stop: end of this rank's slice of the buffer.
        grad_shard: `[shard_stop - shard_start]`, of `StateForm.gradient_dtype`.
        master: shape of `grad_shard`, fp32 (float64 for float64 parameters), on `state_device`.
        has_grad: for each parameter, whether a gradient has arrived in this step.
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
        # bf16 buffers save memory, which an fp32 copy for communication would undo; float64 remains exact.
        self.reduce_dtype = reduce_dtype if grad_dtype == torch.float32 else grad_dtype
        self.specs = [shard_spec_of(parameter) for parameter in parameters]
        self.offsets: list[int] = []
        end = 0
        for spec in self.specs:
            self.offsets.append(end)
            end += -(-math.prod(spec.local_shape) // ALIGNMENT) * ALIGNMENT
        # A bucket is never empty, even if all its parameters are: FSDP leaves some ranks without a row.
        slice_size = max(1, -(-end // (groups.zero_size * NORM_ROW))) * NORM_ROW
        self.shard_start = groups.zero_index * slice_size
        self.shard_stop = self.shard_start + slice_size
        self.numel = slice_size * groups.zero_size

        device = parameters[0].device
        self.state_device = form.state_device(device)
        self.grad_buffer = torch.zeros(self.numel, dtype=grad_dtype, device=device)
        self.grad_views = self.views(self.grad_buffer)
        # Local elements outside all boxes (padding of the vocabulary) are not part of the model.
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
        """Views of a buffer of `numel` elements, one per parameter, each of its local shape."""
        return [
            buffer[offset : offset + math.prod(spec.local_shape)].view(spec.local_shape)
            for offset, spec in zip(self.offsets, self.specs, strict=True)
        ]

    # -- gradients ------------------------------------------------------------------------------------------------

    def begin_step(self, num_gradients: Sequence[int]) -> None:
        """Discard the gradients of the previous step.

        Args:
            num_gradients: for each parameter, how many gradients it receives in this step.
        """
        self.has_grad = [False] * len(self.parameters)
        self._missing = list(num_gradients)
        self._num_incomplete = len(self._missing)
        self._is_reducing = False

    @property
    def is_complete(self) -> bool:
        """Whether every parameter has received all its gradients."""
        return self._num_incomplete == 0

    def accumulate(self, index: int, gradient: Tensor) -> None:
        """Add a gradient of parameter `index` to the buffer; of its local shape, in any dtype.

        Raises:
            RuntimeError: the bucket is already being reduced, because more gradients arrived than expected.
        """
        if self._is_reducing:
            raise RuntimeError(
                f'a gradient of "{self.specs[index].name}" arrived after its reduction had started: it gets more '
                f"than one gradient per backward pass and chunk; set overlap_sync_grad=False"
            )
        view, has_grad = self.grad_views[index], self.has_grad[index]
        if _is_accumulated_by_kernel(view, gradient):
            from internlm.solver.optimizer.triton_kernels import accumulate

            accumulate(view, gradient, adds=has_grad)
        elif has_grad:
            view.add_(gradient)
        else:
            view.copy_(gradient)
        self.has_grad[index] = True
        self._missing[index] -= 1
        self._num_incomplete -= self._missing[index] == 0

    def start_reduction(self) -> None:
        """Start summing gradients over the zero group, or over the replicas if there is none.

        Every rank of the groups must call this, `continue_reduction` and `finish_reduction` of all buckets in the same
        order.
        """
        self._is_reducing = True
        self._zero_missing()
        needs_no_cast = self.reduce_dtype == self.grad_buffer.dtype or self.groups.are_trivial
        if self.groups.zero is None:
            reduced = self.grad_shard if needs_no_cast else self.grad_shard.to(self.reduce_dtype)
            self._reduction = all_reduce_async(reduced, self.groups.replica)
            return
        sent, reduced = self.grad_buffer, self.grad_shard
        if not needs_no_cast:
            sent = sent.to(self.reduce_dtype)
            reduced = torch.empty_like(self.grad_shard, dtype=self.reduce_dtype)
        self._reduction = reduce_scatter_async(reduced, sent, self.groups.zero)

    def continue_reduction(self) -> None:
        """Start the all-reduce over the replicas, which first waits for the reduce-scatter of `start_reduction`."""
        if self.groups.zero is not None and self.groups.replica is not None:
            self._reduction = all_reduce_async(self._reduction.wait(), self.groups.replica)

    def finish_reduction(self) -> None:
        """Wait until `grad_shard` holds the sum over all ranks that contribute to it; after the last backward pass."""
        reduced = self._reduction.wait()
        self._reduction = Pending(self.grad_shard)
        # Not earlier: the other end of the pipeline gets here only after this rank has sent its last gradient.
        for group in self.groups.partial:
            all_reduce(reduced, group)
        if reduced is not self.grad_shard:
            self.grad_shard.copy_(reduced)

    def _zero_missing(self) -> None:
        """Zero the gradients of parameters that received none, and those of padding."""
        for view, has_grad in zip(self.grad_views, self.has_grad, strict=True):
            if not has_grad:
                view.zero_()
        for region in self._padding:
            region.zero_()

    def squared_grad_norm(self) -> Tensor:
        """Sum of the squares of `grad_shard`, a scalar fp64 tensor."""
        shard = self.grad_shard
        is_converted = shard.dtype != master_dtype(shard.dtype)
        rows = [
            torch.linalg.vector_norm(part.view(-1, NORM_ROW), dim=1, dtype=master_dtype(part.dtype))
            for part in shard.split(part_size(shard.device) if is_converted or not shard.is_cuda else len(shard))
        ]
        return torch.cat(rows).double().square().sum()

    # -- parameters -----------------------------------------------------------------------------------------------

    @property
    def needs_gathering(self) -> bool:
        """Whether readers of the parameters must wait for an all-gather."""
        return self.groups.zero is not None

    @abstractmethod
    def write_back(self, part: slice, values: Tensor) -> None:
        """Write updated weights into the parameters; a copy between devices is only started.

        Args:
            part: range of elements of the shard.
            values: values of `master` in that range, in any dtype and on any device.
        """

    def flat_parameters(self, part: slice) -> Tensor | None:
        """The memory that `write_back` writes if it is one flat tensor for that range of the shard; None otherwise."""
        return None

    @abstractmethod
    def start_gathering(self) -> None:
        """Start gathering the weights that other ranks have updated."""

    @abstractmethod
    def finish_gathering(self) -> None:
        """Wait until every parameter holds the updated weights."""

    @abstractmethod
    def reset_master(self) -> None:
        """Overwrite the masters with the parameters, after these were changed from outside."""

    def range_in_shard(self, index: int) -> slice:
        """Range of `master` that is parameter `index`; empty if this rank's slice contains none of it."""
        start = self.offsets[index]
        stop = start + self.grad_views[index].numel()
        size = self.shard_stop - self.shard_start
        return slice(
            min(max(start - self.shard_start, 0), size),
            min(max(stop - self.shard_start, 0), size),
        )

    def pieces(self, shard: Tensor, start: int = 0) -> Iterator[tuple[nn.Parameter, list[tuple[Box, Tensor]]]]:
        """Boxes of each parameter that are in a flat tensor laid out like `master`.

        Args:
            shard: a flat tensor, for example `master` or a moment of it, or a part of one.
            start: index in `master` of the first element of `shard`.

        Yields:
            (parameter, [(box, view of `shard` with the box's shape)]); the list is empty if `shard` contains nothing of
            the parameter.
        """
        for index, parameter in enumerate(self.parameters):
            spec, view = self.specs[index], self.grad_views[index]
            in_master = self.range_in_shard(index)
            own = slice(max(in_master.start - start, 0), min(in_master.stop - start, shard.numel()))
            if own.start >= own.stop:
                yield parameter, []
                continue
            # Position of the first element of `shard`, in elements of this parameter.
            origin = self.shard_start + start - self.offsets[index]
            # A virtual full-tensor view of the flat shard, addressed in the parameter's own coordinates.
            strides = view.stride()
            pieces = []
            for box in spec.boxes_of_flat_range(origin + own.start, origin + own.stop):
                position = sum(index * stride for index, stride in zip(box.local_offset, strides, strict=True))
                piece = shard.as_strided(box.size, strides, position - origin + shard.storage_offset())
                pieces.append((box, piece))
            yield parameter, pieces
