"""GEMMs of groups of rows, each group with its own matrix.

bf16 on CPUs with AVX512-BF16 but no AMX runs an own C++ kernel, everything else a loop of GEMMs over the groups.

In the loop, oneDNN, which computes 16-bit GEMMs, generates code for every new shape: 0.3 to 1.5 ms and up to 0.4 MB, as
much time as the GEMM of 500 rows. Experts get other numbers of rows in every step, so they would rarely meet a shape
again. Numbers of rows are therefore rounded up to one of 8 per power of two, and a group takes rows of its neighbors
along: their results are discarded, and in sums over rows they are replaced by zeros.

Shapes: M rows, sorted by group, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from internlm.model.ops import linear
from internlm.model.ops.cpu.gemm import gemm, widens
from internlm.model.ops.cpu.native import has_matrix_units, has_native_ops
from internlm.model.ops.implementation_choice import Choice

_CLASSES = 8
"""Numbers of rows per power of two; the extra rows are 4 % on average."""

_MIN_STEP = 16
"""Smallest difference between two numbers of rows."""


def choice(device: torch.device, dtype: torch.dtype) -> Choice:
    """The implementation of both functions: "native" or "loop", and why."""
    if device.type != "cpu":
        return Choice("loop", "the own kernel is for CPUs")
    if dtype != torch.bfloat16 or widens(device, dtype):
        return Choice("loop", "the own kernel is for bf16 units")
    if has_matrix_units():
        return Choice("loop", "PyTorch's GEMMs use AMX")
    if not has_native_ops():
        return Choice("loop", "the own kernel is not available")
    return Choice("native", "generates no code for numbers of rows")


def gemm_of_groups(x: Tensor, matrices: Tensor, sizes: Sequence[int], out: Tensor) -> None:
    """`x_r B_g` for each row r and its group g.

    Args:
        x: `[M, A]`.
        matrices: `[G, A, B]`, with contiguous rows or columns.
        sizes: rows of each group; their sum is M.
        out: `[M, B]`, contiguous, receives the result.
    """
    # The kernel reads pairs of inputs.
    if choice(x.device, x.dtype).implementation == "native" and x.shape[1] % 2 == 0:
        torch.ops.internlm_native.gemm_of_groups(_with_rows(x), matrices, sizes, out)
        return
    stop = 0
    for size, matrix in zip(sizes, matrices, strict=True):
        start, stop = stop, stop + size
        first, end = _window(start, stop, x)
        if first < start:
            out[start:stop] = gemm(x[first:end], matrix)[start - first :]
        elif size:
            # Rows behind `stop` are those of later groups, which overwrite them.
            gemm(x[first:end], matrix, out[first:end])


def outer_gemm_of_groups(grad: Tensor, x: Tensor, sizes: Sequence[int], out: Tensor) -> None:
    """`sum_r grad_r x_r^T` over the rows of each group; zeros for groups without rows.

    Args:
        grad: `[M, N]`.
        x: `[M, K]`.
        sizes: rows of each group; their sum is M.
        out: `[G, N, K]`, contiguous, receives the result.
    """
    if choice(x.device, x.dtype).implementation == "native":
        torch.ops.internlm_native.outer_gemm_of_groups(_with_rows(grad), _with_rows(x), sizes, out)
        return
    stop = 0
    for own_out, size in zip(out, sizes, strict=True):
        start, stop = stop, stop + size
        first, end = _window(start, stop, x)
        if not size:
            own_out.zero_()
        else:
            own_grad, rows = (_masked(values, start, stop, first, end) for values in (grad, x))
            linear.weight_gradient(own_grad, rows, own_out)


def _with_rows(x: Tensor) -> Tensor:
    """x if its rows are contiguous, else a copy."""
    return x if x.stride(1) == 1 else x.contiguous()


def _window(start: int, stop: int, x: Tensor) -> tuple[int, int]:
    """Rows of x that contain `start` to `stop`, of a number that is rounded up if x has as many."""
    generates_code = x.is_cpu and x.dtype in (torch.bfloat16, torch.float16) and not widens(x.device, x.dtype)
    if start == stop or not generates_code:
        return start, stop
    size = stop - start
    step = max(_MIN_STEP, (1 << (size.bit_length() - 1)) // _CLASSES)
    size += -size % step
    if start + size <= len(x):
        return start, start + size
    return (stop - size, stop) if size <= stop else (start, stop)


def _masked(x: Tensor, start: int, stop: int, first: int, end: int) -> Tensor:
    """Rows `first` to `end` of x, with zeros outside of `start` to `stop`."""
    if (first, end) == (start, stop):
        return x[start:stop]
    out = x.new_empty(end - first, x.shape[1])
    out[: start - first] = 0
    out[start - first : stop - first] = x[start:stop]
    out[stop - first :] = 0
    return out
