"""How a group of linear layers multiplies: in the dtype of its operands, or in float8.

The layers of a group share an input. What is multiplied is called an operand: a tensor, or a float8 one (`Scaled`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from internlm.core.communication.collectives import all_reduce
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.shard_spec import ShardSpec
from internlm.model.ops.cpu.gemm import linear_product
from internlm.model.ops.float8.scaled_gemm import (
    FORWARD_FORMAT,
    GRADIENT_FORMAT,
    MULTIPLE,
    Scaled,
    amax_of,
    quantize,
    scale_of,
    scaled_product,
)
from internlm.model.ops.linear import input_gradient, weight_gradient
from internlm.utils.errors import ConfigError

Operand = Tensor | Scaled

Casts = tuple[Callable[..., Tensor], Callable[..., Scaled]]
"""`amax_of` and `quantize`, compiled for tensors of any shape or not."""


class Products:
    """In the dtype of the operands. Shapes: an input `[..., in]`, a weight `[out, in]`, a gradient `[..., out]`."""

    is_float8: ClassVar[bool] = False
    """Whether a weight may also come as a `Scaled`."""

    def scales(self, x: Tensor, weights: Sequence[Sequence[Operand]]) -> Tensor | None:
        """Scales of the input and then of each layer's weight, of which it may hold several parts."""
        return None

    def input(self, x: Tensor, scales: Tensor | None) -> Operand:
        """The input as it is multiplied."""
        return x

    def kept(self, x: Operand) -> Tensor:
        """What of it is kept for backward."""
        assert isinstance(x, Tensor)
        return x

    def kept_input(self, kept: Tensor, scales: Tensor | None) -> Operand:
        """The input as it is multiplied, from what was kept."""
        return kept

    def weight(self, weight: Operand, scales: Tensor | None, layer: int) -> Operand:
        """The weight, or a part of it, of one of the layers as it is multiplied."""
        return weight

    def gradients(self, grads: Sequence[Sequence[Tensor]]) -> list[list[Operand]]:
        """Gradients of each layer's outputs as they are multiplied."""
        return [list(own) for own in grads]

    def output(self, x: Operand, weight: Operand, bias: Tensor | None) -> Tensor:
        """`[..., out]`."""
        assert isinstance(x, Tensor) and isinstance(weight, Tensor)
        return linear_product(x, weight, bias)

    def input_gradient(self, grad: Operand, weight: Operand) -> Tensor:
        """`[..., in]`."""
        assert isinstance(grad, Tensor) and isinstance(weight, Tensor)
        return input_gradient(grad, weight)

    def weight_gradient(self, grad: Operand, x: Operand) -> Tensor:
        """`[out, in]`."""
        assert isinstance(grad, Tensor) and isinstance(x, Tensor)
        return weight_gradient(grad, x)


def refuse_odd_shape(name: str, spec: ShardSpec) -> None:
    """For the weight `[out, in]` of a layer that is to multiply in float8.

    Raises:
        ConfigError: the hardware cannot, as it works in tiles.
    """
    # Weights of the weight view are gathered before they are multiplied.
    shape = spec.global_shape if spec.view == "weight" else spec.local_shape
    if any(size % MULTIPLE for size in shape):
        raise ConfigError(
            f"float8.enable_float8_linear = True: the weight of '{name}' is {list(shape)} on this rank, and float8 "
            f"needs multiples of {MULTIPLE}; change the widths of the model or parallel.tensor.size"
        )


@cache
def _compiled_casts() -> Casts:
    # Not as whole graphs: tensors of more kinds than PyTorch compiles for are then cast as if nothing was compiled.
    compiled_amax = torch.compile(amax_of, dynamic=True)
    compiled_quantize = torch.compile(quantize, dynamic=True)

    # Lines of numbers without history: what is kept apart as another kind of tensor is compiled anew.
    def amax_of_lines(*tensors: Tensor) -> Tensor:
        return compiled_amax(*(tensor.detach().flatten() for tensor in tensors))

    def quantize_line(tensor: Tensor, scale: Tensor, format: torch.dtype) -> Scaled:
        line = compiled_quantize(tensor.detach().flatten(), scale, format)
        return line._replace(values=line.values.view(tensor.shape))

    return amax_of_lines, quantize_line


class Float8Products(Products):
    """In float8; see `internlm.model.ops.float8.scaled_gemm`.

    The scale of an input or weight is that of the whole tensor, also where it is split over ranks: then the largest
    magnitudes are joined, in one all-reduce of a few numbers for a group of layers. So every layout rounds every
    element in the same way. Gradients do without: see `GRADIENT_FORMAT`.

    Args:
        context: where this rank stands.
        axis: of the activation view, over which inputs or weights are split; None: they are whole here.
        dtype: of weights and of what the products give.
        compiles_casts: find the largest magnitude, and divide and round, in one kernel each (torch.compile).
        on_hardware: see `float8.runs_on_hardware`.
    """

    is_float8: ClassVar[bool] = True

    def __init__(
        self,
        context: ParallelContext,
        axis: str | None,
        dtype: torch.dtype,
        *,
        compiles_casts: bool = False,
        on_hardware: bool,
    ) -> None:
        self._context = context
        self._axis = axis
        self._dtype = dtype
        casts: Casts = _compiled_casts() if compiles_casts else (amax_of, quantize)
        self._amax_of, self._quantize = casts
        self._on_hardware = on_hardware

    def scales(self, x: Tensor, weights: Sequence[Sequence[Operand]]) -> Tensor:
        """Fp32 `[1 + layers]`."""
        known = [own[0].scale for own in weights if isinstance(own[0], Scaled)]
        unknown = [[w for w in own if isinstance(w, Tensor)] for own in weights]
        amaxes = torch.stack([self._amax_of(*own) for own in ([x], *unknown) if own])
        group = None if self._axis is None else self._context.group(self._axis)
        found = scale_of(all_reduce(amaxes, group, dist.ReduceOp.MAX), FORWARD_FORMAT)
        # The weights of a group come quantized all or none.
        return torch.stack([*found.unbind(), *known]) if known else found

    def input(self, x: Tensor, scales: Tensor | None) -> Scaled:
        assert scales is not None
        return self._quantize(x, scales[0], FORWARD_FORMAT)

    def kept(self, x: Operand) -> Tensor:
        return x.values if isinstance(x, Scaled) else x

    def kept_input(self, kept: Tensor, scales: Tensor | None) -> Scaled:
        assert scales is not None
        return Scaled(kept, scales[0])

    def weight(self, weight: Operand, scales: Tensor | None, layer: int) -> Scaled:
        if isinstance(weight, Scaled):
            return weight
        assert scales is not None
        return self._quantize(weight, scales[1 + layer], FORWARD_FORMAT)

    def gradients(self, grads: Sequence[Sequence[Tensor]]) -> list[list[Operand]]:
        scales = [scale_of(self._amax_of(*own), GRADIENT_FORMAT) for own in grads]
        return [
            [self._quantize(grad, scale, GRADIENT_FORMAT) for grad in own]
            for own, scale in zip(grads, scales, strict=True)
        ]

    def output(self, x: Operand, weight: Operand, bias: Tensor | None) -> Tensor:
        assert isinstance(x, Scaled) and isinstance(weight, Scaled)
        out = self._product(x.flat(), weight.t(), fast=True).unflatten(0, x.values.shape[:-1])
        return out if bias is None else out + bias

    def input_gradient(self, grad: Operand, weight: Operand) -> Tensor:
        assert isinstance(grad, Scaled) and isinstance(weight, Scaled)
        return self._product(grad.flat(), weight).unflatten(0, grad.values.shape[:-1])

    def weight_gradient(self, grad: Operand, x: Operand) -> Tensor:
        assert isinstance(grad, Scaled) and isinstance(x, Scaled)
        return self._product(grad.flat().t(), x.flat())

    def _product(self, a: Scaled, b: Scaled, *, fast: bool = False) -> Tensor:
        return scaled_product(a, b, self._dtype, on_hardware=self._on_hardware, fast=fast)
