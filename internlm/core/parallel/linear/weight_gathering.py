"""Weights of isp: gathering of full weights, and reduction of their gradients.

Each rank holds some rows of every weight, all-gathers the full weight before its GEMMs in forward and backward, and
reduce-scatters the gradient. With overlap, the next weights are prefetched while this layer computes. Experts are split
over ranks of their own, and have a plan of their own.

Source: InternEvo, Chen et al. 2024, arXiv:2401.09149.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from internlm.core.communication.collectives import all_gather_async
from internlm.core.communication.exchange import start_reduce_scatter
from internlm.core.communication.pending import Pending
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.linear.weight_gradients import WeightGradients
from internlm.core.parallel.linear.weight_scales import WeightScales
from internlm.core.parallel.parameter_events import deliver_gradient, wait_until_readable
from internlm.core.parallel.shard_spec import Index, shard_spec_of
from internlm.model.ops.float8.scaled_gemm import FORWARD_FORMAT, Scaled, as_scaled, quantize
from internlm.model.ops.grouped_kernels import GroupedKernels
from internlm.model.ops.linear_kernels import LinearKernels, Operand
from internlm.model.roles import Role

_TRIGGERS = {
    "wqkv": (Role.ATTENTION_QKV, Role.ATTENTION_Q),
    "wo": (Role.ATTENTION_OUT,),
    "w1": (Role.COLUMN, Role.COLUMN_PAIR, Role.EXPERTS),
}
"""The group of layers that starts with the module of this name. ("attn" lies behind "wqkv" and before "wo".)"""


class GatheredGroup(Protocol):
    """Weights that are gathered together, such as those of a `LinearGroup`."""

    @property
    def name(self) -> str:
        """Name of the module, `layers.3.attention.wqkv`."""

    @property
    def role(self) -> Role:
        """Of the module."""

    @property
    def kernels(self) -> LinearKernels | GroupedKernels:
        """Of its GEMMs."""

    def parameters(self) -> list[nn.Parameter]:
        """Local parameters, in the order in which full ones are returned."""

    def __hash__(self) -> int:
        """By identity."""


class BufferPool:
    """Buffers of gathered weights, reused by the next gather of the same size, or freed if not `keeps`."""

    def __init__(self, *, keeps: bool) -> None:
        self._keeps = keeps
        self._free: dict[tuple[int, torch.dtype], list[Tensor]] = {}
        self.num_made = 0
        """Buffers made so far."""

    def acquire(self, numel: int, like: Tensor) -> Tensor:
        """A flat buffer of the dtype and device of `like`."""
        free = self._free.get((numel, like.dtype))
        if free:
            return free.pop()
        self.num_made += 1
        return like.new_empty(numel)

    def release(self, buffer: Tensor) -> None:
        """Return a buffer that is no longer read."""
        if self._keeps:
            self._free.setdefault((buffer.numel(), buffer.dtype), []).append(buffer)


@dataclass
class _GatherInFlight:
    """All-gathers of a group's parameters in flight.

    Attributes:
        buffers: flat, `[n * local rows * in]` each.
        scales: of those that are sent as bytes of float8 numbers; None for the others.
        works: to wait for.
    """

    buffers: list[Tensor] = field(default_factory=list)
    scales: list[Tensor | None] = field(default_factory=list)
    works: list[Pending] = field(default_factory=list)


@dataclass(frozen=True)
class GatherPlan:
    """When the weights of an axis are gathered.

    Attributes:
        overlap: prefetch weights, and overlap the reduction of their gradients with the backward pass.
        ahead: prefetch the weights of the next module, or those of the next layer.
        layer_before: by layer: the module of a layer before which the prefetch of the next layer starts.
        release_gradients_early: free the buffers of a reduced gradient when the next one is reduced, not at the end of
            the step.
        memory_pool: reuse gather buffers.
    """

    overlap: bool = False
    ahead: Literal["layer", "module"] = "layer"
    layer_before: Literal["wqkv", "attn", "wo", "w1"] = "wo"
    release_gradients_early: bool = True
    memory_pool: bool = False


class _GatherAxis:
    """The ranks that share one copy of some weights, and the plan for these."""

    def __init__(self, context: ParallelContext, axis: str, view: str, plan: GatherPlan) -> None:
        self._context, self._axis, self._view = context, axis, view
        self.size = context.size(axis, view)
        self.plan = plan
        self.pool = BufferPool(keeps=plan.memory_pool)
        self.num_deliveries_kept = 1 if plan.release_gradients_early else 1 << 30

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks."""
        return self._context.group(self._axis, self._view)


class GatheredWeights:
    """The `WeightStore` of isp; groups of layers are registered in the order in which they run.

    A group whose weights are not split is registered too: others are prefetched when it runs.

    Args:
        context: this rank's position and process groups.
        weight_gradients: delivers reduced gradients.
        plan: of weights that are split over the weight axis.
        expert_plan: of those of experts, which are split over the expert weight axis.
        reduce_dtype: dtype in which gradients are communicated.
        gather_float8: gather the weights of float8 GEMMs as float8.
        scales: of these.

    Attributes:
        groups: of layers, in order.
        log: if a list, launches, waits and releases are appended as (event, name of the group).
    """

    def __init__(
        self,
        context: ParallelContext,
        weight_gradients: WeightGradients,
        plan: GatherPlan,
        expert_plan: GatherPlan,
        *,
        reduce_dtype: torch.dtype,
        gather_float8: bool,
        scales: WeightScales,
    ) -> None:
        self._num_expert_ranks = context.size("expert", "expert")
        self._axes = {
            "weight": _GatherAxis(context, "weight", "weight", plan),
            "expert": _GatherAxis(context, "expert_weight", "expert", expert_plan),
        }
        self._weight_gradients = weight_gradients
        self._reduce_dtype = reduce_dtype
        self._gathers_float8 = gather_float8
        self._scales = scales
        self.groups: list[GatheredGroup] = []
        self._place: dict[GatheredGroup, int] = {}
        self._layers: list[list[GatheredGroup]] = []
        self._layer_number: dict[GatheredGroup, int] = {}
        self._parameters: dict[GatheredGroup, list[nn.Parameter]] = {}
        self._in_flight: dict[GatheredGroup, _GatherInFlight] = {}
        self._acquired: dict[GatheredGroup, list[Tensor]] = {}
        self.log: list[tuple[str, str]] | None = None

    @property
    def num_buffers_made(self) -> int:
        """Buffers of gathered weights made so far."""
        return sum(axis.pool.num_made for axis in self._axes.values())

    def _axis_of(self, parameter: Tensor) -> _GatherAxis:
        return self._axes[shard_spec_of(parameter).view]

    def _axis(self, group: GatheredGroup) -> _GatherAxis:
        return self._axis_of(self._parameters[group][0])

    def register(self, group: GatheredGroup) -> None:
        """Add the next group of layers."""
        self.groups.append(group)
        self._parameters[group] = group.parameters()
        self._place[group] = len(self._place)
        if not self._layers or _layer_name(self._layers[-1][0]) != _layer_name(group):
            self._layers.append([])
        self._layers[-1].append(group)
        self._layer_number[group] = len(self._layers) - 1

    # -- as a WeightStore -----------------------------------------------------------------------------------------

    def acquire(self, group: GatheredGroup, parameters: Sequence[nn.Parameter], *, backward: bool) -> Sequence[Operand]:
        self._launch(group)
        for axis in self._axes.values():
            if axis.plan.overlap:
                for other in self._next(group, axis, backward=backward):
                    self._launch(other)
        if self._axis(group).size == 1:
            return [as_scaled(parameter) for parameter in parameters]
        gather = self._in_flight.pop(group)
        self._note("wait", group)
        for work in gather.works:
            work.wait()
        self._acquired[group] = gather.buffers
        full: list[Operand] = []
        for parameter, buffer, scale in zip(parameters, gather.buffers, gather.scales, strict=True):
            shape = self._full_shape(parameter)
            rows = buffer[: math.prod(shape)].view(shape)
            full.append(rows if scale is None else Scaled(rows.view(FORWARD_FORMAT), scale))
        return full

    def _full_shape(self, parameter: nn.Parameter) -> Index:
        """The shape of a full weight; of experts that are dealt to ranks, that of all on this rank."""
        spec = shard_spec_of(parameter)
        num_parts = self._num_expert_ranks if spec.view == "expert" else 1
        return (spec.global_shape[0] // num_parts, *spec.global_shape[1:])

    def release(self, group: GatheredGroup) -> None:
        axis = self._axis(group)
        if axis.size > 1:
            self._note("release", group)
            for buffer in self._acquired.pop(group):
                axis.pool.release(buffer)
        if group.role not in _TRIGGERS["wqkv"] or _is_in_backward():
            return
        for axis in self._axes.values():
            if axis.plan.overlap and axis.plan.ahead == "layer" and axis.plan.layer_before == "attn":
                for other in self._of_axis(self._layer(group, +1), axis):
                    self._launch(other)

    def deliver(self, parameter: nn.Parameter, gradient: Tensor) -> Tensor | None:
        axis = self._axis_of(parameter)
        if axis.size == 1:
            return gradient
        padding = parameter.numel() * axis.size - gradient.numel()
        flat = F.pad(gradient.flatten(), (0, padding)).to(self._reduce_dtype)
        reducing = start_reduce_scatter(flat, axis.group, dim=0)

        def finish() -> None:
            deliver_gradient(parameter, reducing.wait().view(parameter.shape))

        if axis.plan.overlap:
            self._weight_gradients.deliver_later(finish, keep=axis.num_deliveries_kept)
        else:
            finish()
        return None

    # -- what is gathered when ------------------------------------------------------------------------------------

    def _next(self, group: GatheredGroup, axis: _GatherAxis, *, backward: bool) -> list[GatheredGroup]:
        """The groups of an axis to prefetch before waiting for `group`, in the order of need."""
        own, plan = self._layer(group, 0), axis.plan
        if _is_in_backward() and not backward:
            # Recomputation of a checkpointed layer: its own backward pass follows, not the next layer.
            later = self._of_axis(own[own.index(group) + 1 :], axis)
            return later[:1] if plan.ahead == "module" else later
        if plan.ahead == "module":
            place = self._place[group]
            others = reversed(self.groups[:place]) if backward else self.groups[place + 1 :]
            return self._of_axis(others, axis, limit=1)
        if backward:
            ahead = self._layer(group, -1) if group.role in _TRIGGERS["wo"] else []
            return self._of_axis([*reversed(own[: own.index(group)]), *reversed(ahead)], axis)
        ahead = self._layer(group, +1) if group.role in _TRIGGERS.get(plan.layer_before, ()) else []
        return self._of_axis([*own[own.index(group) + 1 :], *ahead], axis)

    def _of_axis(
        self, groups: Iterable[GatheredGroup], axis: _GatherAxis, limit: int | None = None
    ) -> list[GatheredGroup]:
        return list(islice((group for group in groups if self._axis(group) is axis), limit))

    def _layer(self, group: GatheredGroup, offset: int) -> list[GatheredGroup]:
        """The groups of the layer `offset` layers behind that of `group`; empty when there is none."""
        number = self._layer_number[group] + offset
        return self._layers[number] if 0 <= number < len(self._layers) else []

    def _launch(self, group: GatheredGroup) -> None:
        axis = self._axis(group)
        if group in self._in_flight or axis.size == 1:
            return
        self._note("launch", group)
        gather = self._in_flight[group] = _GatherInFlight()
        for parameter in self._parameters[group]:
            wait_until_readable(parameter)
        gather.scales = self._scales_of(group)
        for parameter, scale in zip(self._parameters[group], gather.scales, strict=True):
            shard = parameter.detach()
            if scale is not None:
                # As bytes, since not every backend knows float8.
                shard = quantize(shard, scale, FORWARD_FORMAT).values.view(torch.uint8)
            buffer = axis.pool.acquire(axis.size * shard.numel(), shard)
            gather.buffers.append(buffer)
            assert axis.group is not None
            gather.works.append(all_gather_async(buffer, shard.flatten(), axis.group))

    def _scales_of(self, group: GatheredGroup) -> list[Tensor | None]:
        """The scale of each full weight that is gathered in float8; None for the group's other parameters."""
        parameters = self._parameters[group]
        is_float8 = [self._gathers_float8 and group.kernels.is_float8 and p.dim() == 2 for p in parameters]
        shards = [[parameter.detach()] for parameter, chosen in zip(parameters, is_float8, strict=True) if chosen]
        scales = iter(self._scales.of(group, shards, [self._axis(group).group]) if shards else ())
        return [next(scales) if chosen else None for chosen in is_float8]

    @property
    def num_in_flight(self) -> int:
        """Gathers launched and not yet acquired."""
        return len(self._in_flight)

    def drop_unused(self) -> None:
        """Drop gathers that nobody acquired: their weights are about to change."""
        for group, gather in self._in_flight.items():
            for work in gather.works:
                work.wait()
            for buffer in gather.buffers:
                self._axis(group).pool.release(buffer)
        self._in_flight.clear()

    def _note(self, event: str, group: GatheredGroup) -> None:
        if self.log is not None:
            self.log.append((event, group.name))


def _layer_name(group: GatheredGroup) -> str:
    """`layers.3` of `layers.3.attention.wqkv`: the name up to its first number."""
    match = re.match(r"(.*?\.\d+)\.", group.name)
    return match[1] if match else group.name


def _is_in_backward() -> bool:
    # A private name, as there is no public one; recomputation runs a layer's forward inside of autograd's engine.
    return torch._C._current_graph_task_id() != -1
