"""FSDP's gathers of weights that are multiplied in float8: as bytes of float8 numbers, half as many as in bf16.

`fully_shard` asks the local tensor of a parameter what to send and what to make of what came, if it has these two
functions ("all-gather extensions").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from internlm.core.parallel.linear.parallel_linear import ParallelLinear
from internlm.core.parallel.linear.weight_scales import WeightScales
from internlm.model.modules.linear import Float8Linear
from internlm.model.ops.float8.scaled_gemm import FORWARD_FORMAT, quantize
from internlm.model.ops.float8.weight_tensor import Float8Weight


def gather_in_float8(model: nn.Module, scales: WeightScales, tensor_group: dist.ProcessGroup | None) -> None:
    """All-gather the weight of every linear layer that runs its GEMMs in float8 as float8; after `fully_shard`.

    The scale of a weight is that of the whole, so that the values are those of gathering the weight as it is and then
    rounding it.

    Args:
        tensor_group: over which weights were split before FSDP.
    """
    weights = [[part for part in parts if isinstance(part, DTensor)] for parts in _float8_weights(model)]
    weights = [parts for parts in weights if parts]
    together = _Weights(weights, scales, tensor_group)
    for number, parts in enumerate(weights):
        for parameter in parts:
            rows = _Rows(parameter, together, number)
            local: Any = parameter._local_tensor
            local.fsdp_pre_all_gather, local.fsdp_post_all_gather = rows.before, rows.after


def _float8_weights(model: nn.Module) -> Iterator[list[Tensor]]:
    """The parts of each weight that is multiplied in float8."""
    for module in model.modules():
        if isinstance(module, Float8Linear):
            yield [module.weight]
        elif isinstance(module, ParallelLinear) and module.group.kernels.is_float8:
            yield [shard.weight for shard in module.shards()]


class _Weights(NamedTuple):
    """The weights that have their scales computed together: all of the model, in two all-reduces a step at most."""

    parts: Sequence[Sequence[DTensor]]
    scales: WeightScales
    tensor_group: dist.ProcessGroup | None

    def scale(self, number: int, zero_group: dist.ProcessGroup) -> Tensor:
        """The scale of one of them, over the ranks that hold its rows and those that hold its other parts."""
        shards = [[part._local_tensor for part in parts] for parts in self.parts]
        return self.scales.of("fsdp", shards, (zero_group, self.tensor_group))[number]


class _Rows:
    """This rank's rows of a parameter, which is one of the weights or a part of it."""

    def __init__(self, parameter: DTensor, weights: _Weights, number: int) -> None:
        self._parameter = parameter
        self._weights = weights
        self._number = number

    @torch.no_grad()
    def before(
        self, mesh: DeviceMesh, outer_size: Any, outer_stride: Any, module: Any, mp_policy: Any
    ) -> tuple[tuple[Tensor], Tensor]:
        """What is sent, and what is kept for `after`: bytes `[padded rows, in]`, and the scale."""
        scale = self._weights.scale(self._number, mesh.get_group())
        values = quantize(self._parameter._local_tensor, scale, FORWARD_FORMAT).values.view(torch.uint8)
        padding = -(-outer_size[0] // mesh.size()) - values.shape[0]
        return (F.pad(values, (0, 0, 0, padding)),), scale

    @torch.no_grad()
    def after(
        self, gathered: tuple[Tensor], scale: Tensor, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor]] | None:
        """The whole weight, and the tensors whose storage FSDP frees and fills again; `out`: filled already."""
        if out is not None:
            assert isinstance(out, Float8Weight)
            out.scale = scale
            return None
        values = gathered[0].view(FORWARD_FORMAT)[: self._parameter.shape[0]]
        return Float8Weight(values, scale, dtype), gathered
