"""FSDP's all-gathers of the weights of float8 GEMMs: in float8, which is half the bytes of bf16.

`fully_shard` calls two methods of a parameter's local tensor if it has them ("all-gather extensions"): one returns the
tensors to send, the other builds the full weight from the gathered ones.
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
    """All-gather the weights of linear layers that run their GEMMs in float8 as float8. Changes `model`.

    A weight has one scale, computed from its maximum over all ranks, so the values equal those of gathering the weight
    in its own dtype and rounding it afterwards.

    Args:
        model: after `fully_shard`.
        scales: computes and caches the scales of a step.
        tensor_group: the ranks over which weights were split before FSDP; None if they were not.
    """
    weights = [[part for part in parts if isinstance(part, DTensor)] for parts in _float8_weights(model)]
    weights = [parts for parts in weights if parts]
    scaled = _ScaledWeights(weights, scales, tensor_group)
    for number, parts in enumerate(weights):
        for parameter in parts:
            extension = _Float8AllGather(parameter, scaled, number)
            local: Any = parameter._local_tensor
            local.fsdp_pre_all_gather, local.fsdp_post_all_gather = extension.before, extension.after


def _float8_weights(model: nn.Module) -> Iterator[list[Tensor]]:
    """The parameters that make up each weight of a float8 GEMM."""
    for module in model.modules():
        if isinstance(module, Float8Linear):
            yield [module.weight]
        elif isinstance(module, ParallelLinear) and module.group.kernels.is_float8:
            yield [shard.weight for shard in module.shards()]


class _ScaledWeights(NamedTuple):
    """All float8 weights of the model; their scales are computed together, in at most two all-reduces per step."""

    parts: Sequence[Sequence[DTensor]]
    scales: WeightScales
    tensor_group: dist.ProcessGroup | None

    def scale(self, number: int, zero_group: dist.ProcessGroup) -> Tensor:
        """The scale of weight `number`: its maximum is reduced over the ranks that hold its rows and other parts."""
        shards = [[part._local_tensor for part in parts] for parts in self.parts]
        return self.scales.of("fsdp", shards, (zero_group, self.tensor_group))[number]


class _Float8AllGather:
    """The all-gather extension of a parameter that is weight `number`, or a part of it."""

    def __init__(self, parameter: DTensor, weights: _ScaledWeights, number: int) -> None:
        self._parameter = parameter
        self._weights = weights
        self._number = number

    @torch.no_grad()
    def before(
        self, mesh: DeviceMesh, outer_size: Any, outer_stride: Any, module: Any, mp_policy: Any
    ) -> tuple[tuple[Tensor], Tensor]:
        """Tensors to send, uint8 `[padded rows, in]`, and the scale, which is passed on to `after`."""
        scale = self._weights.scale(self._number, mesh.get_group())
        values = quantize(self._parameter._local_tensor, scale, FORWARD_FORMAT).values.view(torch.uint8)
        padding = -(-outer_size[0] // mesh.size()) - values.shape[0]
        return (F.pad(values, (0, 0, 0, padding)),), scale

    @torch.no_grad()
    def after(
        self, gathered: tuple[Tensor], scale: Tensor, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor]] | None:
        """The full weight, and the tensors whose storage FSDP frees and refills. With `out`, they are refilled."""
        if out is not None:
            assert isinstance(out, Float8Weight)
            out.scale = scale
            return None
        values = gathered[0].view(FORWARD_FORMAT)[: self._parameter.shape[0]]
        return Float8Weight(values, scale, dtype), gathered
