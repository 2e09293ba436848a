"""GEMMs of the experts of a layer in float8: each row with the weight of its expert.

A row of an input has a scale of its own, and so has the weight of each expert. Rows of a rank may come from the samples
of several others: a scale of all of them would depend on the layout. The gradient of a weight sums over rows, so their
scales are multiplied into the gradients of outputs before these are rounded; the wide range of e5m2 takes them up.

Three implementations, equal up to the order of additions:

- "grouped": PyTorch's grouped GEMM of float8 numbers for outputs (e4m3 only, compute capability 9.x). Those with
  gradients (e5m2) run in PyTorch's grouped GEMM of bf16, which holds the rounded numbers exactly; no waits.
- "loop": one float8 GEMM after the other. The host waits for the counts.
- "emulation": rounded numbers, multiplied in the dtype of the model by `internlm.model.ops.grouped_linear`.

Shapes: M rows sorted by expert, E experts, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from internlm.model.ops import grouped_linear
from internlm.model.ops.float8.scaled_gemm import (
    MULTIPLE,
    Scaled,
    runs_on_hardware,
    scaled_product,
    why_not_on_hardware,
)
from internlm.model.ops.implementation_choice import Choice

Implementation = Literal["grouped", "loop", "emulation"]

_GROUPED_CAPABILITY = 9
"""Major compute capability for which PyTorch has a grouped GEMM of float8 numbers with scales of rows."""


def choice(device: torch.device) -> Choice:
    """What the experts of a layer in float8 run on."""
    kind = implementation(device)
    if kind == "grouped":
        return Choice(
            "torch._scaled_grouped_mm; gradients: torch.nn.functional.grouped_mm",
            "float8 matrix units for outputs; PyTorch has no grouped GEMM of e5m2, so rounded gradients are multiplied "
            "in bf16",
        )
    if kind == "loop":
        return Choice(
            "torch._scaled_mm in a loop over the experts, which waits for the device",
            f"PyTorch has a grouped GEMM of float8 only for compute capability {_GROUPED_CAPABILITY}",
        )
    plain = grouped_linear.choice(device, torch.bfloat16).implementation
    why = why_not_on_hardware(device) if device.type == "cuda" else None
    return Choice(f"emulation; {plain}", why or f"{device.type} has no float8 matrix units that torch uses")


def implementation(device: torch.device) -> Implementation:
    """The implementation on a device."""
    if not runs_on_hardware(device):
        return "emulation"
    return "grouped" if torch.cuda.get_device_capability(device)[0] == _GROUPED_CAPABILITY else "loop"


def output(x: Scaled, weight: Scaled, counts: Tensor, dtype: torch.dtype, kind: Implementation) -> Tensor:
    """`x_r weight_e^T` for each row r and its expert e, `[M, N]` in `dtype`.

    Args:
        x: `[M, K]`, a scale for each row.
        weight: `[E, N, K]`, a scale for each expert.
        counts: int64 `[E]`, rows of each expert; their sum is M.
        dtype: of the output; bf16 on hardware.
        kind: of `implementation`.
    """
    if kind == "grouped":
        return _scaled_grouped_mm(x, weight, counts, dtype)
    if kind == "emulation":
        return grouped_linear.grouped_linear(x.to(dtype), weight.to(dtype), counts)
    out = torch.empty(x.values.shape[0], weight.values.shape[1], dtype=dtype, device=x.values.device)
    for expert, rows in _rows_of_experts(counts, out):
        out[rows] = _scaled_rows(x, rows, _expert(weight, expert).t(), dtype, fast=True)
    return out


def input_gradient(grad: Scaled, weight: Scaled, counts: Tensor, dtype: torch.dtype, kind: Implementation) -> Tensor:
    """The gradient of the rows, `[M, K]`.

    Args:
        grad: `[M, N]`, a scale for each row.
        weight, counts, dtype, kind: see `output`.
    """
    if kind != "loop":
        return grouped_linear.input_gradient(grad.to(dtype), weight.to(dtype), counts)
    out = torch.empty(grad.values.shape[0], weight.values.shape[2], dtype=dtype, device=grad.values.device)
    for expert, rows in _rows_of_experts(counts, out):
        out[rows] = _scaled_rows(grad, rows, _expert(weight, expert), dtype)
    return out


def weight_gradient(grad: Scaled, x: Tensor, counts: Tensor, dtype: torch.dtype, kind: Implementation) -> Tensor:
    """The gradient of the weight, `[E, N, K]`; zero for experts without rows.

    Args:
        grad: `[M, N]`, of gradients multiplied with the scales of the rows. A scale for each row, equal for those of an
            expert.
        x: values of the rows, `[M, K]`.
        counts, dtype, kind: see `output`.
    """
    if kind != "loop":
        return grouped_linear.weight_gradient(grad.to(dtype), x.to(dtype), counts)
    out = torch.zeros(counts.shape[0], grad.values.shape[1], x.shape[1], dtype=dtype, device=x.device)
    for expert, rows in _rows_of_experts(counts, x):
        own_grad, own_x = (_whole_tiles(values[rows]) for values in (grad.values, x))
        scale = grad.scale[rows.start]
        out[expert] = scaled_product(
            Scaled(own_grad, scale).t(), Scaled(own_x, torch.ones_like(scale)), dtype, on_hardware=_is_gpu(out)
        )
    return out


def _scaled_grouped_mm(x: Scaled, weight: Scaled, counts: Tensor, dtype: torch.dtype) -> Tensor:
    num_experts, num_outputs, _ = weight.values.shape
    if x.values.shape[0] == 0:
        return torch.empty(0, num_outputs, dtype=dtype, device=x.values.device)
    # A scale for each column of each expert is what the kernel takes.
    columns = weight.scale.unsqueeze(-1).expand(num_experts, num_outputs).contiguous()
    out: Tensor = torch._scaled_grouped_mm(
        grouped_linear.aligned(x.values),
        grouped_linear.aligned(weight.values).transpose(1, 2),
        x.scale.contiguous(),
        columns,
        offs=grouped_linear.ends_of(counts),
        out_dtype=dtype,
        use_fast_accum=True,
    )
    return out


def _rows_of_experts(counts: Tensor, rows: Tensor) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, and which. The host waits for the counts."""
    start = 0
    for expert, number in enumerate(grouped_linear.sizes_of(counts, rows)):
        if number:
            yield expert, slice(start, start + number)
        start += number


def _scaled_rows(a: Scaled, rows: slice, matrix: Scaled, dtype: torch.dtype, *, fast: bool = False) -> Tensor:
    """Some rows of a, each with a scale of its own, times a matrix."""
    own = Scaled(a.values[rows], torch.ones_like(matrix.scale))
    product = scaled_product(own, matrix, dtype, on_hardware=_is_gpu(a.values), fast=fast)
    return product * a.scale[rows].unsqueeze(-1).to(dtype)


def _expert(weight: Scaled, expert: int) -> Scaled:
    return Scaled(weight.values[expert], weight.scale[expert])


def _whole_tiles(values: Tensor) -> Tensor:
    """Rows in float8, followed by rows of zeros up to a multiple of `MULTIPLE`: the units sum over whole tiles."""
    number = len(values)
    padded = values.new_zeros(-(-number // MULTIPLE) * MULTIPLE, values.shape[1])
    padded[:number] = values
    return padded


def _is_gpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"
