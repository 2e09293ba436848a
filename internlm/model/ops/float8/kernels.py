"""GEMMs of linear layers in float8, and the scales of their operands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from internlm.model.ops.float8.scaled_gemm import (
    FORWARD_FORMAT,
    GRADIENT_FORMAT,
    Scaled,
    amax_of,
    quantize,
    scale_of,
    scaled_product,
)
from internlm.model.ops.linear_kernels import LinearKernels, Operand

Casts = tuple[Callable[..., Tensor], Callable[..., Scaled]]
"""`amax_of` and `quantize`, either compiled for tensors of any shape or not."""


@cache
def _compiled_casts() -> Casts:
    # Without fullgraph: beyond the recompile limit the casts run eagerly instead of failing.
    compiled_amax = torch.compile(amax_of, dynamic=True)
    compiled_quantize = torch.compile(quantize, dynamic=True)

    # Flat and detached, as other ranks of tensors and those that require gradients would be compiled separately.
    def amax_of_flat(*tensors: Tensor) -> Tensor:
        return compiled_amax(*(tensor.detach().flatten() for tensor in tensors))

    def quantize_flat(tensor: Tensor, scale: Tensor, format: torch.dtype) -> Scaled:
        flat = compiled_quantize(tensor.detach().flatten(), scale, format)
        return flat._replace(values=flat.values.view(tensor.shape))

    return amax_of_flat, quantize_flat


class Float8Kernels(LinearKernels):
    """GEMMs in float8; see `internlm.model.ops.float8.scaled_gemm`.

    The scale of an input or weight is that of the full tensor, also where it is split over ranks: one reduction of the
    largest magnitudes serves a group of layers. So every layout rounds every element in the same way. Gradients do
    without: see `GRADIENT_FORMAT`.

    Args:
        dtype: of weights and of the results of the GEMMs.
        on_hardware: see `scaled_gemm.runs_on_hardware`.
        reduce_amax: largest magnitudes on this rank (fp32 `[n]`) -> those of the full tensors; None: inputs and weights
            are not split.
        compiles_casts: fuse the search for the largest magnitude, and the quantization, into one kernel each
            (torch.compile).
    """

    is_float8: ClassVar[bool] = True

    def __init__(
        self,
        dtype: torch.dtype,
        *,
        on_hardware: bool,
        reduce_amax: Callable[[Tensor], Tensor] | None = None,
        compiles_casts: bool = False,
    ) -> None:
        self._reduce_amax = reduce_amax
        self._dtype = dtype
        casts: Casts = _compiled_casts() if compiles_casts else (amax_of, quantize)
        self._amax_of, self._quantize = casts
        self._on_hardware = on_hardware

    def compute_scales(self, x: Tensor, weights: Sequence[Sequence[Operand]]) -> Tensor:
        """Fp32 `[1 + layers]`."""
        known = [own[0].scale for own in weights if isinstance(own[0], Scaled)]
        unknown = [[w for w in own if isinstance(w, Tensor)] for own in weights]
        amaxes = torch.stack([self._amax_of(*own) for own in ([x], *unknown) if own])
        found = scale_of(amaxes if self._reduce_amax is None else self._reduce_amax(amaxes), FORWARD_FORMAT)
        # The weights of a group come quantized all or none.
        return torch.stack([*found.unbind(), *known]) if known else found

    def quantize_input(self, x: Tensor, scales: Tensor | None) -> Scaled:
        assert scales is not None
        return self._quantize(x, scales[0], FORWARD_FORMAT)

    def saved_input(self, x: Operand) -> Tensor:
        return x.values if isinstance(x, Scaled) else x

    def restore_input(self, saved: Tensor, scales: Tensor | None) -> Scaled:
        assert scales is not None
        return Scaled(saved, scales[0])

    def quantize_weight(self, weight: Operand, scales: Tensor | None, layer: int) -> Scaled:
        if isinstance(weight, Scaled):
            return weight
        assert scales is not None
        return self._quantize(weight, scales[1 + layer], FORWARD_FORMAT)

    def quantize_gradients(self, grads: Sequence[Sequence[Tensor]]) -> list[list[Operand]]:
        scales = [scale_of(self._amax_of(*own), GRADIENT_FORMAT) for own in grads]
        return [
            [self._quantize(grad, scale, GRADIENT_FORMAT) for grad in own]
            for own, scale in zip(grads, scales, strict=True)
        ]

    def output(self, x: Operand, weight: Operand, bias: Tensor | None) -> Tensor:
        assert isinstance(x, Scaled) and isinstance(weight, Scaled)
        out = self._gemm(x.flat(), weight.t(), fast=True).unflatten(0, x.values.shape[:-1])
        return out if bias is None else out + bias

    def input_gradient(self, grad: Operand, weight: Operand) -> Tensor:
        assert isinstance(grad, Scaled) and isinstance(weight, Scaled)
        return self._gemm(grad.flat(), weight).unflatten(0, grad.values.shape[:-1])

    def weight_gradient(self, grad: Operand, x: Operand) -> Tensor:
        assert isinstance(grad, Scaled) and isinstance(x, Scaled)
        return self._gemm(grad.flat().t(), x.flat())

    def _gemm(self, a: Scaled, b: Scaled, *, fast: bool = False) -> Tensor:
        return scaled_product(a, b, self._dtype, on_hardware=self._on_hardware, fast=fast)
