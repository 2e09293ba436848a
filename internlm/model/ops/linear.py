"""Linear layers, with the dtype and memory layout in which the GEMMs of a CPU are fast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from internlm.model.ops.cpu import gemm as cpu_gemm
from internlm.model.ops.cpu.gemm import gemm, linear_gemm, widens
from internlm.model.ops.cpu.native import has_matrix_units, has_native_ops
from internlm.model.ops.implementation_choice import Choice

_MIN_TRANSPOSED_WIDTH = 1024
"""Smallest size of a weight's wider side for which transposing pays off."""

_FEW_ROWS = 16
"""Largest number of rows for the operator that reads the weight once; with more, GEMMs are as fast."""


def choice(device: torch.device, dtype: torch.dtype) -> Choice:
    """The implementation of `linear` and `weight_gradient`."""
    if device.type != "cpu":
        return Choice("PyTorch's GEMMs", "fastest on this device")
    format = cpu_gemm.choice(dtype)
    if format.implementation == "fp32":
        return Choice("PyTorch's GEMMs in fp32, block by block, rounded once", format.reason)
    if _transposes(device, dtype):
        return Choice(
            "PyTorch's GEMMs; own C++ transpose before wide weight gradients", "faster than transposed views on AMX"
        )
    return Choice("PyTorch's GEMMs", format.reason)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x weight^T + bias`.

    Args:
        x: `[..., in]`.
        weight: `[out, in]`.
        bias: `[out]` or None.

    Returns:
        `[..., out]`.
    """
    if _has_few_rows(x, weight):
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        few: Tensor = torch.ops.internlm_native.linear_of_few_rows(rows, weight, bias)
        return few.reshape(*x.shape[:-1], weight.shape[0])
    if widens(x.device, x.dtype) or (_transposes(x.device, x.dtype) and max(weight.shape) >= _MIN_TRANSPOSED_WIDTH):
        out: Tensor = _Linear.apply(x, weight, bias)
        return out
    return F.linear(x, weight, bias)


def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """Gradient of the input of a linear layer, `[..., in]`.

    Args:
        grad: gradient of the output, `[..., out]`.
        weight: `[out, in]`.
    """
    if widens(grad.device, grad.dtype):
        return gemm(grad.flatten(0, -2), weight).unflatten(0, grad.shape[:-1])
    return grad @ weight


def weight_gradient(grad: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """Gradient of the weight of a linear layer, `[out, in]`.

    Args:
        grad: gradient of the output, `[..., out]`.
        x: input, `[..., in]`.
        out: receives the result; None: a new tensor.
    """
    grad, x = grad.flatten(0, -2), x.flatten(0, -2)
    if not _transposes(x.device, x.dtype) or max(grad.shape[1], x.shape[1]) < _MIN_TRANSPOSED_WIDTH:
        return gemm(grad.t(), x, out)
    # oneDNN's GEMM is half as fast if its left operand is a transposed view. The narrower matrix is transposed.
    if grad.shape[1] <= x.shape[1]:
        return gemm(_transposed(grad), x, out)
    result = _transposed(_transposed(x) @ grad)
    return result if out is None else out.copy_(result)


def _has_few_rows(x: Tensor, weight: Tensor) -> bool:
    """Whether this is a product of generation, whose time is that of reading the weight.

    Generation runs in inference mode. Evaluation in a run does not, so that its numbers are the same however its rows
    are dealt to micro-batches and ranks.
    """
    return (
        # Compiled code cannot ask for the mode.
        not torch.compiler.is_compiling()
        and torch.is_inference_mode_enabled()
        and x.device.type == "cpu"
        and x.dtype in (torch.bfloat16, torch.float32)
        and x.dtype == weight.dtype
        and 0 < x.numel() <= _FEW_ROWS * x.shape[-1]
        and weight.is_contiguous()
        and has_native_ops()
    )


def _transposes(device: torch.device, dtype: torch.dtype) -> bool:
    # Without AMX, a transposed view costs nothing.
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and has_matrix_units()
        and not widens(device, dtype)
        and has_native_ops()
    )


def _transposed(x: Tensor) -> Tensor:
    """`[R, C]` -> `[C, R]`, contiguous."""
    out: Tensor = torch.ops.internlm_native.transposed(x if x.stride(1) == 1 else x.contiguous())
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear_gemm(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        return (
            input_gradient(grad, weight) if ctx.needs_input_grad[0] else None,
            weight_gradient(grad, x) if ctx.needs_input_grad[1] else None,
            grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None,
        )
