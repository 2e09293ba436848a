"""Matrix products of a linear layer in 8-bit floating point, with one scale for each tensor.

Those of experts are in `internlm.model.ops.float8.grouped_gemm`.

A tensor is divided by a scale that puts its largest magnitude near the top of the format, and rounded: inputs and
weights to e4m3 (3 bits of fraction), gradients of outputs to e5m2 (2 bits, more range). Products of such numbers are
summed in fp32 and multiplied with both scales. Weights, gradients of weights and all between layers keep their dtype.

A scale is a power of two, so that dividing by it rounds nothing: what is lost is lost in the one rounding to float8,
and the emulation differs from the hardware in the order of additions alone. Scales are taken from the tensor at hand
("dynamic"); nothing is remembered from step to step.

Sources: Micikevicius et al. 2022, arXiv:2209.05433 (formats, which tensor in which); powers of two as in the
microscaling formats, Rouhani et al. 2023, arXiv:2310.10537.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from internlm.model.ops.float8.weight_tensor import Float8Weight
from internlm.model.ops.implementation_choice import Choice

FORWARD_FORMAT = torch.float8_e4m3fn
"""Of inputs and weights."""

GRADIENT_FORMAT = torch.float8_e5m2
"""Of gradients of outputs. Whatever power of two is the scale, a number of at least 2^-29 of the largest is rounded to
the same two bits of fraction: parts of a tensor may have scales of their own."""

MULTIPLE = 16
"""Every dimension of a product (tokens, input and output features) must be a multiple of it on the hardware."""

NEEDED_CAPABILITY = (8, 9)
"""The first compute capability with float8 matrix units (Ada; Hopper is 9.0)."""

_SCALE_ALIGNMENT = 16
"""Bytes. With another address cublasLtMatmul returns CUBLAS_STATUS_NOT_SUPPORTED (seen with cuBLAS of CUDA 13.0)."""

_SMALLEST_AMAX = 2.0**-100
"""Taken for the largest magnitude of a tensor that has none above it, such as one of zeros."""

_EXPONENT_BITS = 0x7F800000
"""Of an fp32 number: without the others it is the power of two at or below it."""


class Scaled(NamedTuple):
    """A tensor in float8.

    Attributes:
        values: float8.
        scale: fp32, a power of two: one (a scalar tensor), or one for each index of the first dimension of the values
            (`[n]`). The tensor is `values * scale`.
    """

    values: Tensor
    scale: Tensor

    def flat(self) -> Scaled:
        """`[..., n]` -> `[T, n]`."""
        return self._replace(values=self.values.flatten(0, -2))

    def t(self) -> Scaled:
        """`[m, n]` -> `[n, m]`, a view."""
        return self._replace(values=self.values.t())

    def to_float(self) -> Tensor:
        """The tensor in fp32, exactly."""
        return self.to(torch.float32)

    def to(self, dtype: torch.dtype) -> Tensor:
        """The tensor in a dtype with the range of fp32, exactly."""
        return self.values.to(dtype) * spread(self.scale, self.values).to(dtype)


def choice(device: torch.device) -> Choice:
    """What `float8_linear` runs on."""
    if runs_on_hardware(device):
        return Choice("torch._scaled_mm", "float8 matrix units")
    if device.type != "cuda":
        return Choice(
            "emulation",
            f"rounds to float8 and multiplies in the model's dtype, as {device.type} has no "
            "float8 matrix units that torch uses",
        )
    return Choice("emulation", f"no float8 matrix units: {why_not_on_hardware(device)}")


def runs_on_hardware(device: torch.device) -> bool:
    """Whether products of float8 tensors on `device` are computed by float8 matrix units."""
    return device.type == "cuda" and why_not_on_hardware(device) is None


@cache
def why_not_on_hardware(device: torch.device) -> str | None:
    """For a CUDA device without float8 matrix units that torch uses: what is missing; else None."""
    if torch.version.cuda is None:
        return "this build of torch is not for NVIDIA devices"
    capability = torch.cuda.get_device_capability(device)
    if capability >= NEEDED_CAPABILITY:
        return None
    have, need = (".".join(map(str, numbers)) for numbers in (capability, NEEDED_CAPABILITY))
    return f"{torch.cuda.get_device_name(device)} has compute capability {have}, float8 needs {need}"


def amax_of(*tensors: Tensor) -> Tensor:
    """The largest magnitude in some tensors, fp32 scalar; infinite when one has an element that is NaN or infinite."""
    extremes = [extreme for tensor in tensors for extreme in torch.aminmax(tensor.detach())]
    largest = torch.stack(extremes).abs().amax().float()
    # A maximum over ranks may drop NaN, but never infinity.
    return largest.nan_to_num(nan=math.inf, posinf=math.inf)


def amaxes_of(tensor: Tensor) -> Tensor:
    """The largest magnitude for each index of the first dimension, fp32 `[n]`; infinite as that of `amax_of`.

    Args:
        tensor: `[n, ...]`, n may be 0.
    """
    low, high = torch.aminmax(tensor.detach().flatten(1), dim=1)
    return torch.maximum(high, -low).float().nan_to_num(nan=math.inf, posinf=math.inf)


def spread(scale: Tensor, tensor: Tensor) -> Tensor:
    """The scale of a `Scaled` in a shape that broadcasts with its values `tensor`."""
    return scale.view(-1, *[1] * (tensor.dim() - 1)) if scale.dim() else scale


def scale_of(amax: Tensor, format: torch.dtype) -> Tensor:
    """The smallest power of two by which tensors of this largest magnitude can be divided to fit a float8 format.

    Args:
        amax: fp32, any shape. Where it is infinite, so is the scale, and all that is computed with it is NaN: the
            step is then skipped like any other whose gradients are not finite.
    """
    factor = torch.finfo(format).max / amax.clamp(min=_SMALLEST_AMAX)
    return factor.view(torch.int32).bitwise_and(_EXPONENT_BITS).view(torch.float32).reciprocal()


def quantize(tensor: Tensor, scale: Tensor, format: torch.dtype) -> Scaled:
    """Divide by a scale and round to the nearest number of a float8 format, ties to even.

    Args:
        scale: of `scale_of`, for an amax that no element exceeds; see `Scaled`.
    """
    factor = spread(scale.reciprocal(), tensor)
    # One number does not change the dtype of a product, several would.
    factor = factor.to(tensor.dtype) if factor.dim() else factor
    return Scaled((tensor.detach() * factor).to(format), scale)


def scaled_product(a: Scaled, b: Scaled, dtype: torch.dtype, *, on_hardware: bool, fast: bool = False) -> Tensor:
    """`a @ b`: `[M, K]` times `[K, N]` -> `[M, N]` in `dtype`.

    Args:
        on_hardware: of `runs_on_hardware`; else the numbers are multiplied in `dtype`, which holds them exactly.
        fast: on Hopper sum in less than fp32 within the matrix units: enough for outputs, not for gradients.
    """
    if on_hardware:
        # The units read both operands along K.
        return torch._scaled_mm(
            a.values.contiguous(),
            b.values.t().contiguous().t(),
            _at_aligned_address(a.scale),
            _at_aligned_address(b.scale),
            out_dtype=dtype,
            use_fast_accum=fast,
        )
    return (a.values.to(dtype) @ b.values.to(dtype)) * (a.scale * b.scale)


def _at_aligned_address(scale: Tensor) -> Tensor:
    """The same scale where cuBLAS can read it: it refuses addresses that are not multiples of 16 bytes.

    An element of a vector of scales is at such an address only by chance. While a compiler traces, no address is known
    yet. It removes clones, so the copy is the absolute value: a scale is positive.
    """
    if torch.compiler.is_compiling() or scale.data_ptr() % _SCALE_ALIGNMENT:
        return scale.abs()
    return scale


def as_scaled(weight: Tensor) -> Tensor | Scaled:
    """What a `Float8Weight` stands for; any other weight as it is."""
    return Scaled(weight.float8, weight.scale) if isinstance(weight, Float8Weight) else weight
