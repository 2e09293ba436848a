"""Weights of isp: gathering of full weights, and reduction of their gradients.

Each rank holds some rows of every weight, all-gathers the full weight before its GEMMs in forward and backward, and
reduce-scatters the gradient. With overlap, the next weights are prefetched while this layer computes.

Source: InternEvo, Chen et al. 2024, arXiv:2401.09149.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from internlm.core.communication.collectives import all_gather_async
from internlm.core.communication.exchange import start_reduce_scatter
from internlm.core.communication.pending import Pending
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.linear.parallel_linear import LinearGroup
from internlm.core.parallel.linear.weight_gradients import WeightGradients
from internlm.core.parallel.linear.weight_scales import WeightScales
from internlm.core.parallel.parameter_events import deliver_gradient, wait_until_readable
from internlm.core.parallel.shard_spec import shard_spec_of
from internlm.model.ops.float8.scaled_gemm import FORWARD_FORMAT, Scaled, quantize
from internlm.model.ops.linear_kernels import Operand
from internlm.model.roles import Role

_TRIGGERS = {
    "wqkv": (Role.ATTENTION_QKV, Role.ATTENTION_Q),
    "wo": (Role.ATTENTION_OUT,),
    "w1": (Role.COLUMN, Role.COLUMN_PAIR),
}
"""The group of layers that starts with the module of this name. ("attn" lies behind "wqkv" and before "wo".)"""


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
    """When weights are gathered; see `ParallelOptions`."""

    overlap: bool
    ahead: str
    layer_before: str


class GatheredWeights:
    """The `WeightStore` of isp; groups of layers are registered in the order in which they run.

    Attributes:
        groups: of layers, in order.
        pool: of buffers.
        log: if a list, launches, waits and releases are appended as (event, name of the group).
    """

    def __init__(
        self,
        context: ParallelContext,
        weight_gradients: WeightGradients,
        plan: GatherPlan,
        *,
        memory_pool: bool,
        release_gradients_early: bool,
        reduce_dtype: torch.dtype,
        gather_float8: bool,
        scales: WeightScales,
    ) -> None:
        self._context = context
        self._weight_gradients = weight_gradients
        self._plan = plan
        self.pool = BufferPool(keeps=memory_pool)
        self._num_deliveries_kept = 1 if release_gradients_early else 1 << 30
        self._reduce_dtype = reduce_dtype
        self._gathers_float8 = gather_float8
        self._scales = scales
        self.groups: list[LinearGroup] = []
        self._place: dict[LinearGroup, int] = {}
        self._layers: list[list[LinearGroup]] = []
        self._layer_number: dict[LinearGroup, int] = {}
        self._parameters: dict[LinearGroup, list[nn.Parameter]] = {}
        self._in_flight: dict[LinearGroup, _GatherInFlight] = {}
        self._acquired: dict[LinearGroup, list[Tensor]] = {}
        self.log: list[tuple[str, str]] | None = None

    def register(self, group: LinearGroup) -> None:
        """Add the next group of layers."""
        self.groups.append(group)
        self._parameters[group] = group.parameters()
        self._place[group] = len(self._place)
        if not self._layers or _layer_name(self._layers[-1][0]) != _layer_name(group):
            self._layers.append([])
        self._layers[-1].append(group)
        self._layer_number[group] = len(self._layers) - 1

    # -- as a WeightStore -----------------------------------------------------------------------------------------

    def acquire(self, group: LinearGroup, parameters: Sequence[nn.Parameter], *, backward: bool) -> Sequence[Operand]:
        self._launch(group)
        if self._plan.overlap:
            for other in self._next(group, backward=backward):
                self._launch(other)
        gather = self._in_flight.pop(group)
        self._note("wait", group)
        for work in gather.works:
            work.wait()
        self._acquired[group] = gather.buffers
        full: list[Operand] = []
        for parameter, buffer, scale in zip(parameters, gather.buffers, gather.scales, strict=True):
            shape = shard_spec_of(parameter).global_shape
            rows = buffer.view(-1, *shape[1:])[: shape[0]]
            full.append(rows if scale is None else Scaled(rows.view(FORWARD_FORMAT), scale))
        return full

    def release(self, group: LinearGroup) -> None:
        self._note("release", group)
        for buffer in self._acquired.pop(group):
            self.pool.release(buffer)
        behind_projection = self._plan.layer_before == "attn" and group.role in _TRIGGERS["wqkv"]
        if self._plan.overlap and self._plan.ahead == "layer" and behind_projection and not _is_in_backward():
            for other in self._layer(group, +1):
                self._launch(other)

    def deliver(self, parameter: nn.Parameter, gradient: Tensor) -> Tensor | None:
        rows = parameter.shape[0] * self._context.size("weight", "weight")
        padded = F.pad(gradient, (0, 0) * (gradient.dim() - 1) + (0, rows - gradient.shape[0]))
        reducing = start_reduce_scatter(padded.to(self._reduce_dtype), self._context.group("weight", "weight"), dim=0)
        if not self._plan.overlap:
            deliver_gradient(parameter, reducing.wait())
        else:
            self._weight_gradients.deliver_later(
                lambda: deliver_gradient(parameter, reducing.wait()), keep=self._num_deliveries_kept
            )
        return None

    # -- what is gathered when ------------------------------------------------------------------------------------

    def _next(self, group: LinearGroup, *, backward: bool) -> list[LinearGroup]:
        """The groups to prefetch before waiting for `group`, in the order of need."""
        own = self._layer(group, 0)
        if backward:
            if self._plan.ahead == "module":
                place = self._place[group]
                return self.groups[max(place - 1, 0) : place]
            ahead = self._layer(group, -1) if group.role in _TRIGGERS["wo"] else []
            return [*reversed(own[: own.index(group)]), *reversed(ahead)]
        if _is_in_backward():
            # Recomputation of a checkpointed layer: its own backward pass follows, not the next layer.
            later = own[own.index(group) + 1 :]
            return later[:1] if self._plan.ahead == "module" else later
        if self._plan.ahead == "module":
            place = self._place[group]
            return self.groups[place + 1 : place + 2]
        ahead = self._layer(group, +1) if group.role in _TRIGGERS.get(self._plan.layer_before, ()) else []
        return [*own[own.index(group) + 1 :], *ahead]

    def _layer(self, group: LinearGroup, offset: int) -> list[LinearGroup]:
        """The groups of the layer `offset` layers behind that of `group`; empty when there is none."""
        number = self._layer_number[group] + offset
        return self._layers[number] if 0 <= number < len(self._layers) else []

    def _launch(self, group: LinearGroup) -> None:
        if group in self._in_flight:
            return
        self._note("launch", group)
        size, process_group = self._context.size("weight", "weight"), self._context.group("weight", "weight")
        gather = self._in_flight[group] = _GatherInFlight()
        for parameter in self._parameters[group]:
            wait_until_readable(parameter)
        gather.scales = self._scales_of(group)
        for parameter, scale in zip(self._parameters[group], gather.scales, strict=True):
            shard = parameter.detach()
            if scale is not None:
                # As bytes, since not every backend knows float8.
                shard = quantize(shard, scale, FORWARD_FORMAT).values.view(torch.uint8)
            buffer = self.pool.acquire(size * shard.numel(), shard)
            gather.buffers.append(buffer)
            if process_group is None:
                buffer.copy_(shard.flatten())
            else:
                gather.works.append(all_gather_async(buffer, shard.flatten(), process_group))

    def _scales_of(self, group: LinearGroup) -> list[Tensor | None]:
        """The scale of each full weight that is gathered in float8; None for the group's other parameters."""
        parameters = self._parameters[group]
        is_float8 = [self._gathers_float8 and group.kernels.is_float8 and p.dim() == 2 for p in parameters]
        shards = [[parameter.detach()] for parameter, chosen in zip(parameters, is_float8, strict=True) if chosen]
        scales = iter(self._scales.of(group, shards, [self._context.group("weight", "weight")]) if shards else ())
        return [next(scales) if chosen else None for chosen in is_float8]

    @property
    def num_in_flight(self) -> int:
        """Gathers launched and not yet acquired."""
        return len(self._in_flight)

    def drop_unused(self) -> None:
        """Drop gathers that nobody acquired: their weights are about to change."""
        for gather in self._in_flight.values():
            for work in gather.works:
                work.wait()
            for buffer in gather.buffers:
                self.pool.release(buffer)
        self._in_flight.clear()

    def _note(self, event: str, group: LinearGroup) -> None:
        if self.log is not None:
            self.log.append((event, group.name))


def _layer_name(group: LinearGroup) -> str:
    """`layers.3` of `layers.3.attention.wqkv`: the name up to its first number."""
    match = re.match(r"(.*?\.\d+)\.", group.name)
    return match[1] if match else group.name


def _is_in_backward() -> bool:
    # A private name, as there is no public one; recomputation runs a layer's forward inside of autograd's engine.
    return torch._C._current_graph_task_id() != -1
