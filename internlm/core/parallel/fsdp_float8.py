"""FSDP's gathers of weights that are multiplied in float8: as bytes of float8 numbers, half as many as in bf16.

`fully_shard` asks the local tensor of a parameter what to send and what to make of what came, if it has these two
functions ("all-gather extensions").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from internlm.core.parallel.whole_scales import WholeScales
from internlm.model.modules.linear import Float8Linear
from internlm.model.ops.float8 import FORWARD_FORMAT, quantize
from internlm.model.ops.float8_weight import Float8Weight


def gather_in_float8(model: nn.Module, scales: WholeScales) -> None:
    """Let every `Float8Linear` get its weight in float8; after `fully_shard`.

    The scale of a weight is that of the whole, so that the values are those of gathering the weight as it is and then
    rounding it.
    """
    layers = [module for module in model.modules() if isinstance(module, Float8Linear)]
    parameters = [layer.weight for layer in layers if isinstance(layer.weight, DTensor)]
    for number, parameter in enumerate(parameters):
        rows = _Rows(parameters, number, scales)
        local: Any = parameter._local_tensor
        local.fsdp_pre_all_gather, local.fsdp_post_all_gather = rows.before, rows.after


class _Rows:
    """This rank's rows of one of the weights that have their scales computed together."""

    def __init__(self, parameters: Sequence[DTensor], number: int, scales: WholeScales) -> None:
        self._parameters = parameters
        self._number = number
        self._scales = scales

    @torch.no_grad()
    def before(
        self, mesh: DeviceMesh, outer_size: Any, outer_stride: Any, module: Any, mp_policy: Any
    ) -> tuple[tuple[Tensor], Tensor]:
        """What is sent, and what is kept for `after`: bytes `[padded rows, in]`, and the scale."""
        # All weights of the model at once: one all-reduce a step.
        shards = [parameter._local_tensor.detach() for parameter in self._parameters]
        scale = self._scales.of("fsdp", shards, mesh.get_group())[self._number]
        values = quantize(shards[self._number], scale, FORWARD_FORMAT).values.view(torch.uint8)
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
        rows = self._parameters[self._number].shape[0]
        values = gathered[0].view(FORWARD_FORMAT)[:rows]
        return Float8Weight(values, scale, dtype), gathered
