"""Linear layers of experts: each row is multiplied by the weight of its expert.

`internlm::grouped_linear` and its two gradients are each one node for torch.compile and for selective recomputation.
They run one of these implementations:

- PyTorch's grouped GEMM, which reads the counts on the device, where it has a kernel: bf16 on GPUs of compute
  capability 9 and 10, rows of a multiple of 16 bytes;
- on a CPU, `cpu/grouped_gemm.py`;
- elsewhere a loop over the experts, which reads the counts on the host: a wait for the device.

Shapes: M rows sorted by expert, E experts, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from internlm.model.ops import linear
from internlm.model.ops.attention.cuda_backends import capability_of
from internlm.model.ops.cpu import grouped_gemm
from internlm.model.ops.cpu.grouped_gemm import gemm_of_groups, outer_gemm_of_groups
from internlm.model.ops.implementation_choice import Choice

_ALIGNMENT = 16
"""Bytes; PyTorch's grouped GEMM requires rows and matrices to start at multiples of it."""

_CAPABILITIES = (9, 10)
"""Major compute capabilities for which PyTorch has a grouped GEMM; on others, it loops over the experts itself."""


def choice(device: torch.device, dtype: torch.dtype, widths: Sequence[int] = ()) -> Choice:
    """The implementation of `grouped_linear`.

    Args:
        device, dtype: of the rows.
        widths: numbers of inputs and outputs; without any, multiples of 8 are assumed.
    """
    if device.type == "cpu":
        own = grouped_gemm.choice(device, dtype)
        if own.implementation == "native":
            return Choice("own C++ kernel", own.reason)
        return Choice(
            f"a loop over the experts; {linear.choice(device, dtype).implementation}",
            f"PyTorch's grouped GEMM is the same loop on a CPU, and {own.reason}",
        )
    problem = _why_looped(device, dtype, widths)
    if problem is not None:
        return Choice("a loop over the experts, which waits for the device", problem)
    return Choice(
        "torch.nn.functional.grouped_mm",
        "reads the counts on the device" + ("" if widths else "; widths that are no multiple of 8: a loop"),
    )


def _why_looped(device: torch.device, dtype: torch.dtype, widths: Sequence[int]) -> str | None:
    """Why PyTorch's grouped GEMM is not used; None if it is."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "PyTorch has no grouped GEMM for this device"
    if dtype != torch.bfloat16:
        return "PyTorch's grouped GEMM supports only bf16"
    capability = capability_of(device)
    if capability is None or capability[0] not in _CAPABILITIES:
        return "PyTorch's grouped GEMM needs compute capability 9 or 10"
    odd = [width for width in widths if width * dtype.itemsize % _ALIGNMENT]
    if odd:
        return f"PyTorch's grouped GEMM needs widths that are multiples of 8, not {', '.join(map(str, odd))}"
    return None


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """`x_r weight_e^T` for each row r and its expert e.

    The gradient of the weight of an expert without rows is zero. Where `choice` names a loop and the device is not a
    CPU, each of the three GEMMs (forward, gradients of rows and of weight) waits for the device.

    Args:
        x: `[M, K]`, sorted by expert.
        weight: `[E, N, K]`, in the dtype of x.
        counts: int64 `[E]`, rows of each expert, on the device of x; their sum is M.

    Returns:
        `[M, N]`.

    Raises:
        ValueError: the sum of the counts is not M. Not checked on a GPU, where the check would wait for the device.
    """
    out: Tensor = _grouped_linear(x, weight, counts)
    return out


def input_gradient(grad: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Gradient of the rows, `[M, K]`.

    Args:
        grad: gradient of the output, `[M, N]`.
        weight, counts: see `grouped_linear`.
    """
    out: Tensor = _input_gradient(grad, weight, counts)
    return out


def weight_gradient(grad: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    """Gradient of the weight, `[E, N, K]`; zero for experts without rows.

    Args:
        grad: gradient of the output, `[M, N]`.
        x, counts: see `grouped_linear`.
    """
    out: Tensor = _weight_gradient(grad, x, counts)
    return out


@torch.library.custom_op(
    "internlm::grouped_linear", mutates_args=(), schema="(Tensor x, Tensor weight, Tensor counts) -> Tensor"
)
def _grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    if not _is_looped(x, weight.shape[1]):
        return _grouped_mm(x, weight.transpose(1, 2), counts)
    out = x.new_empty(x.shape[0], weight.shape[1])
    gemm_of_groups(x, weight.transpose(1, 2), sizes_of(counts, x), out)
    return out


@_grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op(
    "internlm::grouped_linear_input_gradient",
    mutates_args=(),
    schema="(Tensor grad, Tensor weight, Tensor counts) -> Tensor",
)
def _input_gradient(grad: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    if not _is_looped(grad, weight.shape[2]):
        return _grouped_mm(grad, weight, counts)
    out = grad.new_empty(grad.shape[0], weight.shape[2])
    gemm_of_groups(grad, weight, sizes_of(counts, grad), out)
    return out


@_input_gradient.register_fake
def _(grad: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return grad.new_empty(grad.shape[0], weight.shape[2])


@torch.library.custom_op(
    "internlm::grouped_linear_weight_gradient",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor counts) -> Tensor",
)
def _weight_gradient(grad: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    if not _is_looped(grad, x.shape[1]):
        return _grouped_weight_gradient(grad, x, counts)
    out = x.new_empty(counts.shape[0], grad.shape[1], x.shape[1])
    outer_gemm_of_groups(grad, x, sizes_of(counts, x), out)
    return out


@_weight_gradient.register_fake
def _(grad: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(counts.shape[0], grad.shape[1], x.shape[1])


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, counts = ctx.saved_tensors
    return (
        _input_gradient(grad, weight, counts) if ctx.needs_input_grad[0] else None,
        _weight_gradient(grad, x, counts) if ctx.needs_input_grad[1] else None,
        None,
    )


_grouped_linear.register_autograd(_differentiate, setup_context=_save_for_backward)


def _is_looped(rows: Tensor, width: int) -> bool:
    """Whether the GEMMs of these rows, and those of `width`, run in a loop over the experts."""
    return rows.device.type == "cpu" or _why_looped(rows.device, rows.dtype, (rows.shape[1], width)) is not None


def sizes_of(counts: Tensor, rows: Tensor) -> list[int]:
    """The counts, on the host; raises ValueError if their sum is not the number of rows."""
    sizes: list[int] = counts.tolist()
    if sum(sizes) != rows.shape[0]:
        raise ValueError(f"counts {sizes}: the experts have {sum(sizes)} rows in all, but there are {rows.shape[0]}")
    return sizes


def _grouped_mm(rows: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
    """`[M, A]` and `[E, A, B]` (or a transposed view) -> `[M, B]`."""
    if rows.shape[0] == 0:
        return rows.new_empty(0, matrices.shape[2])
    out: Tensor = F.grouped_mm(aligned(rows), aligned(matrices), offs=ends_of(counts))
    return out


def _grouped_weight_gradient(grad: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    """`[M, N]` and `[M, K]` -> `[E, N, K]`."""
    if x.shape[0] == 0:
        return x.new_zeros(counts.shape[0], grad.shape[1], x.shape[1])
    out: Tensor = F.grouped_mm(aligned(grad).t(), aligned(x), offs=ends_of(counts))
    capability = capability_of(x.device)
    if capability is not None and capability[0] == 10:
        # On Blackwell, the results of empty groups are not zero (pytorch/pytorch#172439).
        out.masked_fill_((counts == 0).view(-1, 1, 1), 0)
    return out


def ends_of(counts: Tensor) -> Tensor:
    """One past the last row of each expert, int32 as PyTorch's grouped GEMM requires."""
    return counts.cumsum(0).to(torch.int32)


def aligned(x: Tensor) -> Tensor:
    """x if its rows and matrices are contiguous and aligned, up to a transposition of matrices; else a copy.

    PyTorch's grouped GEMM refuses expanded gradients, and weights that start at any element of a flat buffer.
    """
    is_transposed = x.dim() == 3 and x.stride(1) == 1 and x.stride(2) != 1
    rows = x.transpose(1, 2) if is_transposed else x
    strides = (rows.shape[-2] * rows.shape[-1], rows.shape[-1], 1)[-x.dim() :]
    if rows.stride() != strides or rows.data_ptr() % _ALIGNMENT:
        rows = rows.new_empty(rows.shape).copy_(rows)
    return rows.transpose(1, 2) if is_transposed else rows
