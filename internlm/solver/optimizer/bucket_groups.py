"""What the parameters of a bucket have in common, and the process groups of their gradients and masters."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.shard_spec import shard_spec_of
from internlm.solver.optimizer.parameter_groups import GroupOptions
from internlm.solver.optimizer.state_form import master_dtype


@dataclass(frozen=True)
class BucketKind:
    """What the parameters of one bucket have in common.

    Attributes:
        dtype: dtype of the parameters.
        options: options of their parameter group.
        view: the rank view of the axes below.
        data_axis: gradients are summed over it; its inner `zero` sub-axis shards the optimizer state.
        partial_over: further axes over which gradients are summed.
        sharded_over: axes over which the parameters themselves are sharded; if `zero` is among them (FSDP), gradients
            arrive already summed over it.
    """

    dtype: torch.dtype
    options: GroupOptions
    view: str
    data_axis: str
    partial_over: tuple[str, ...]
    sharded_over: tuple[str, ...]

    @classmethod
    def of(cls, parameter: nn.Parameter, options: GroupOptions) -> BucketKind:
        """The kind of a parameter, from its dtype, ShardSpec and group options."""
        spec = shard_spec_of(parameter)
        return cls(parameter.dtype, options, spec.view, spec.data_axis, spec.partial_over, spec.sharded_over)

    @property
    def has_master(self) -> bool:
        """Whether the masters are more precise than the parameters."""
        return self.dtype != master_dtype(self.dtype)

    @property
    def is_sharded_over_zero(self) -> bool:
        """Whether the parameters themselves are sharded over the zero axis (FSDP)."""
        return "zero" in self.sharded_over

    def groups(self, context: ParallelContext) -> BucketGroups:
        """The process groups over which gradients are summed and masters sharded."""
        # ZeRO splits the data axis of a view into two sub-axes.
        has_zero = self.data_axis in context.view(self.view).merged
        replica = f"{self.data_axis}_replica" if has_zero else self.data_axis
        return BucketGroups(
            zero=context.group("zero", self.view) if has_zero and not self.is_sharded_over_zero else None,
            replica=context.group(replica, self.view),
            partial=tuple(context.group(axis, self.view) for axis in self.partial_over),
        )

    def replication_factor(self, context: ParallelContext) -> int:
        """Number of ranks on which each element of the summed gradient exists; the gradient norm divides by it.

        Pipeline stages have different parameters, except one that is shared by the first and the last stage.
        """
        view = context.view(self.view)
        axes = {"pipeline", *self.sharded_over}
        if self.data_axis in view.merged:
            axes.add("zero")
        num_replicas = view.world_size // math.prod(view.size(axis) for axis in axes)
        return num_replicas * math.prod(view.size(axis) for axis in self.partial_over if axis == "pipeline_ends")


class BucketGroups:
    """The process groups of a bucket; None where this rank is alone.

    The `ParallelContext` owns the groups: a group's threads end with its last strong reference, so only weak references
    are stored here.

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
    def are_trivial(self) -> bool:
        """Whether no other rank contributes to the gradients."""
        return all(reference is None for reference in (self._zero, self._replica, *self._partial))

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
