"""GEMMs of the linear layers of experts in float8, and the scales of their operands."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from internlm.model.ops.float8 import grouped_gemm
from internlm.model.ops.float8.scaled_gemm import (
    FORWARD_FORMAT,
    GRADIENT_FORMAT,
    Scaled,
    amaxes_of,
    quantize,
    scale_of,
)
from internlm.model.ops.grouped_kernels import GroupedKernels
from internlm.model.ops.linear_kernels import Operand

Casts = tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor, torch.dtype], Scaled]]
"""`amaxes_of` and `quantize`, either compiled for tensors of any shape or not."""


@cache
def _compiled_casts() -> Casts:
    # Without fullgraph: beyond the recompile limit the casts run eagerly instead of failing.
    compiled_amaxes = torch.compile(amaxes_of, dynamic=True)
    compiled_quantize = torch.compile(quantize, dynamic=True)

    # Detached, as tensors that require gradients would be compiled separately.
    def amaxes_of_detached(tensor: Tensor) -> Tensor:
        return compiled_amaxes(tensor.detach())

    def quantize_detached(tensor: Tensor, scale: Tensor, format: torch.dtype) -> Scaled:
        return compiled_quantize(tensor.detach(), scale, format)

    return amaxes_of_detached, quantize_detached


class Float8GroupedKernels(GroupedKernels):
    """GEMMs in float8; see `internlm.model.ops.float8.grouped_gemm`.

    The scale of a row and that of the weight of an expert are those of the full ones, also where these are split over
    ranks. So every layout rounds every element in the same way. Gradients do without: see `GRADIENT_FORMAT`. Each row
    of them has a scale for the gradient of the input, and the rows of an expert have one for that of its weight.

    Args:
        dtype: of weights and of the results of the GEMMs.
        implementation: of `grouped_gemm.implementation`.
        splits_rows: the inputs K are split over ranks.
        reduce_amax: largest magnitudes on this rank (fp32 `[n]`) -> those of full rows and weights; None: neither is
            split.
        compiles_casts: fuse the search for the largest magnitudes, and the quantization, into one kernel each
            (torch.compile).
    """

    is_float8: ClassVar[bool] = True

    def __init__(
        self,
        dtype: torch.dtype,
        implementation: grouped_gemm.Implementation,
        *,
        splits_rows: bool = False,
        reduce_amax: Callable[[Tensor], Tensor] | None = None,
        compiles_casts: bool = False,
    ) -> None:
        self._dtype = dtype
        self._implementation = implementation
        self._splits_rows = splits_rows
        self._reduce_amax = reduce_amax
        casts: Casts = _compiled_casts() if compiles_casts else (amaxes_of, quantize)
        self._amaxes_of, self._quantize = casts

    def compute_scales(self, rows: Tensor, weight: Operand) -> list[Tensor]:
        of_rows = self._amaxes_of(rows)
        of_weight = weight.scale.new_empty(0) if isinstance(weight, Scaled) else self._amaxes_of(weight)
        if self._reduce_amax is not None and self._splits_rows:
            joint = self._reduce_amax(torch.cat([of_rows, of_weight]))
            of_rows, of_weight = joint.split([len(of_rows), len(of_weight)])
        elif self._reduce_amax is not None and len(of_weight):
            of_weight = self._reduce_amax(of_weight)
        known = weight.scale.clone() if isinstance(weight, Scaled) else scale_of(of_weight, FORWARD_FORMAT)
        return [scale_of(of_rows, FORWARD_FORMAT), known]

    def saved_rows(self, rows: Tensor, scales: list[Tensor]) -> Tensor:
        return self._quantize(rows, scales[0], FORWARD_FORMAT).values

    def output(self, saved: Tensor, weight: Operand, counts: Tensor, scales: list[Tensor]) -> Tensor:
        x = Scaled(saved, scales[0])
        return grouped_gemm.output(x, self._weight(weight, scales), counts, self._dtype, self._implementation)

    def input_gradient(self, grad: Tensor, weight: Operand, counts: Tensor, scales: list[Tensor]) -> Tensor:
        rounded = self._quantize(grad, scale_of(self._amaxes_of(grad), GRADIENT_FORMAT), GRADIENT_FORMAT)
        return grouped_gemm.input_gradient(
            rounded, self._weight(weight, scales), counts, self._dtype, self._implementation
        )

    def weight_gradient(self, grad: Tensor, saved: Tensor, counts: Tensor, scales: list[Tensor]) -> Tensor:
        # Of the gradient times the scales of the rows. Zero times infinity counts as infinity.
        amaxes = (self._amaxes_of(grad) * scales[0]).nan_to_num(nan=math.inf, posinf=math.inf)
        scale = scale_of(_largest_of_experts(amaxes, counts), GRADIENT_FORMAT)
        values = self._quantize(grad, scale / scales[0], GRADIENT_FORMAT).values
        return grouped_gemm.weight_gradient(Scaled(values, scale), saved, counts, self._dtype, self._implementation)

    def _weight(self, weight: Operand, scales: list[Tensor]) -> Scaled:
        return weight if isinstance(weight, Scaled) else self._quantize(weight, scales[1], FORWARD_FORMAT)


def _largest_of_experts(amaxes: Tensor, counts: Tensor) -> Tensor:
    """For each row `[M]`, the largest magnitude in all rows of its expert."""
    numbers = torch.arange(len(counts), device=counts.device)
    experts = numbers.repeat_interleave(counts, output_size=len(amaxes))
    return amaxes.new_zeros(len(counts)).scatter_reduce(0, experts, amaxes, "amax")[experts]
