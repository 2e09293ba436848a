"""Parameters, gradients and their shard laid out flat, so that one collective and one kernel serve many tensors."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from internlm.core.communication.collectives import (
    Done,
    Work,
    all_gather_async,
    all_reduce,
    reduce_scatter_async,
)
from internlm.core.parallel.shard_spec import Box, shard_spec_of

# Rows over which a norm is summed in fp32; a single fp32 sum over millions of elements is wrong in the fourth digit.
NORM_ROW = 1024

# Tensors start at multiples of this many elements: vector loads stay aligned whatever the tensor's size.
ALIGNMENT = 32


@dataclass(frozen=True)
class BucketKind:
    """What the parameters of one bucket have in common.

    Attributes:
        dtype: of the parameters.
        has_decay: whether weight decay applies.
        view: the rank view of the axes below.
        data_axis: gradients are summed over it; its inner `zero` sub-axis shards the optimizer state.
        partial_over: further axes over which gradients are summed.
        sharded_over: axes over which the parameters themselves are sharded.
    """

    dtype: torch.dtype
    has_decay: bool
    view: str
    data_axis: str
    partial_over: tuple[str, ...]
    sharded_over: tuple[str, ...]


class BucketGroups:
    """The process groups of a bucket; None where this rank is alone.

    The groups stay the property of the `ParallelContext`: a group's threads end when nobody holds it any more, so what
    is kept here are weak references.

    Args:
        zero: ranks that share one copy of the optimizer state.
        replica: ranks that hold copies of this rank's optimizer state, over the data axis.
        partial: one group for each axis of `BucketKind.partial_over`.
    """

    def __init__(
        self,
        zero: dist.ProcessGroup | None,
        replica: dist.ProcessGroup | None,
        partial: Sequence[dist.ProcessGroup | None] = (),
    ) -> None:
        self.zero_size = 1 if zero is None else dist.get_world_size(zero)
        self.zero_index = 0 if zero is None else dist.get_rank(zero)
        self._zero, self._replica = _weak(zero), _weak(replica)
        self._partial = tuple(_weak(group) for group in partial)

    @property
    def zero(self) -> dist.ProcessGroup | None:
        """Ranks that share one copy of the optimizer state."""
        return _group(self._zero)

    @property
    def replica(self) -> dist.ProcessGroup | None:
        """Ranks that hold copies of this rank's optimizer state."""
        return _group(self._replica)

    @property
    def partial(self) -> tuple[dist.ProcessGroup | None, ...]:
        """One group for each further axis over which gradients are summed."""
        return tuple(_group(reference) for reference in self._partial)


def _weak(group: dist.ProcessGroup | None) -> weakref.ref[dist.ProcessGroup] | None:
    return None if group is None else weakref.ref(group)


def _group(reference: weakref.ref[dist.ProcessGroup] | None) -> dist.ProcessGroup | None:
    if reference is None:
        return None
    group = reference()
    if group is None:
        raise RuntimeError("the process groups of this optimizer are gone: its ParallelContext was closed")
    return group


class FlatBucket:
    """A run of parameters in one flat buffer of their dtype, with flat fp32 gradients and an fp32 master shard.

    The parameters become views of `parameter_buffer`. Rank z of the zero group owns the z-th equal slice of the
    buffer: its summed gradients are `grad_shard`, its fp32 weights `master`.
    """

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
        device = parameters[0].device
        self.offsets: list[int] = []
        end = 0
        for parameter in parameters:
            self.offsets.append(end)
            end += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
        slice_size = -(-end // (groups.zero_size * NORM_ROW)) * NORM_ROW
        numel = slice_size * groups.zero_size
        self.shard_start = groups.zero_index * slice_size
        self.shard_stop = self.shard_start + slice_size

        self.parameter_buffer = torch.zeros(numel, dtype=kind.dtype, device=device)
        self.grad_buffer = torch.zeros(numel, dtype=torch.float32, device=device)
        self.grad_views: list[Tensor] = []
        for parameter, offset in zip(parameters, self.offsets, strict=True):
            view = self.parameter_buffer[offset : offset + parameter.numel()].view_as(parameter)
            view.copy_(parameter.detach())
            parameter.data = view
            self.grad_views.append(self.grad_buffer[offset : offset + parameter.numel()].view_as(parameter))

        own = self.parameter_buffer[self.shard_start : self.shard_stop]
        self.parameter_shard = own
        # fp32 parameters are their own master copy.
        self.master = nn.Parameter(own if kind.dtype == torch.float32 else own.float())
        if groups.zero is None:
            self.grad_shard = self.grad_buffer
        else:
            self.grad_shard = torch.zeros(slice_size, dtype=torch.float32, device=device)
        self._has_grad = [False] * len(parameters)
        self._reduction: Work = Done()
        self._reduced: Tensor = self.grad_shard
        self._gathering: Work = Done()

    def begin_step(self) -> None:
        """Forget the gradients of the step before."""
        self._has_grad = [False] * len(self.parameters)

    def accumulate(self, index: int) -> None:
        """Add the gradient that autograd left on parameter `index` to the fp32 buffer, and free it."""
        parameter = self.parameters[index]
        assert parameter.grad is not None
        if self._has_grad[index]:
            self.grad_views[index].add_(parameter.grad)
        else:
            self.grad_views[index].copy_(parameter.grad)
            self._has_grad[index] = True
        parameter.grad = None

    def start_reduction(self) -> None:
        """Start summing gradients over the data ranks; every rank of the group must call it, in the same order."""
        for view, has_grad in zip(self.grad_views, self._has_grad, strict=True):
            if not has_grad:
                view.zero_()
        if self.groups.zero is None:
            return
        if self.reduce_dtype == torch.float32:
            self._reduced = self.grad_shard
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

    def start_gathering(self) -> None:
        """Write the masters back into the parameters and start collecting the other ranks' shares."""
        self._write_back()
        if self.groups.zero is not None:
            self._gathering = all_gather_async(self.parameter_buffer, self.parameter_shard.clone(), self.groups.zero)

    def finish_gathering(self) -> None:
        """Wait until every parameter holds the updated weights."""
        self._gathering.wait()
        self._gathering = Done()

    @torch.no_grad()
    def _write_back(self) -> None:
        if self.master.data_ptr() != self.parameter_shard.data_ptr():
            self.parameter_shard.copy_(self.master)

    @torch.no_grad()
    def reset_master(self) -> None:
        """Take the masters anew from the parameters, after somebody else wrote the parameters."""
        if self.master.data_ptr() != self.parameter_shard.data_ptr():
            self.master.copy_(self.parameter_shard)

    def pieces(self, shard: Tensor) -> Iterator[tuple[nn.Parameter, list[tuple[Box, Tensor]]]]:
        """For each parameter of this bucket, the boxes of it that a flat tensor laid out like `master` holds.

        Args:
            shard: fp32 `[shard_stop - shard_start]`, for example `master` or a moment of it.

        Yields:
            (parameter, [(box, view of `shard` with the box's shape)]); the list is empty when this rank's slice holds
            nothing of the parameter.
        """
        for parameter, offset in zip(self.parameters, self.offsets, strict=True):
            spec = shard_spec_of(parameter)
            start = max(offset, self.shard_start)
            stop = min(offset + parameter.numel(), self.shard_stop)
            # A virtual whole-tensor view of the flat shard: boxes address it in the parameter's own coordinates.
            strides = parameter.stride()
            pieces = []
            for box in spec.boxes_of_flat_range(start - offset, stop - offset):
                position = sum(index * stride for index, stride in zip(box.local_offset, strides, strict=True))
                view = shard.as_strided(
                    box.size, strides, offset + position - self.shard_start + shard.storage_offset()
                )
                pieces.append((box, view))
            yield parameter, pieces
