"""Causal attention on CPU, dense or packed, as one operator with an explicit backward.

`internlm::cpu_attention` and its backward are each one node to torch.compile and to selective recomputation. Behind
them is one of these kernels:

- "native": our own in C++, for bf16 on CPUs with AMX or AVX512-BF16; all documents in one call;
- "flash": PyTorch's flash attention, one call for all documents of equal length;
- "wide": the same in fp32, rounded once, for 16-bit numbers that the CPU has no units for;
- "blocks": batched matrix products by blocks of queries, one call for all documents of equal length (16-bit ones: of
  equal length but for padding): for backward passes in bf16 where there is no native kernel, and under a window.

Shapes: B sequences, S tokens, H query heads, K key-value heads (H a multiple of K), D head dimension.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from internlm.model.ops.cpu.blocked_attention import blocked_backward, blocked_forward

CpuKernel = Literal["native", "flash", "wide", "blocks"]

_LENGTH_MULTIPLE = 64
"""16-bit kernels are compiled for each new shape; documents padded to a multiple of this have few shapes."""


def cpu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    *,
    window: int | None,
    scale: float | None,
    kernel: CpuKernel,
) -> Tensor:
    """Causal attention of rows, or of the documents in one row.

    Args:
        q: `[B, S, H, D]` on CPU.
        k, v: `[B, S, K, D]`.
        cu_seqlens: int32 `[n + 1]` on CPU, where the documents of the one row (B = 1) begin and end; None: each row is
            one document.
        window: keys that a query sees at most, itself included; None: all before it.
        scale: factor of the scores; None: 1 / sqrt(D).
        kernel: see the head of this file. "blocks" goes forward by "flash" where it can; "flash" knows no window, so
            that with one it means "blocks".

    Returns:
        `[B, S, H, D]`, contiguous.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if window is not None and window >= q.shape[1]:
        window = None
    if window is not None and kernel == "flash":
        kernel = "blocks"
    out, _ = _attention(q, k, v, cu_seqlens, window, scale, kernel)
    return out


@torch.library.custom_op(
    "internlm::cpu_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, int? window, float scale, str kernel)"
    " -> (Tensor, Tensor)",
)
def _attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, window: int | None, scale: float, kernel: str
) -> tuple[Tensor, Tensor]:
    """The result, and the logarithms of the scores' partitions `[B, H, S]` (none by blocks, which make them again)."""
    if kernel == "native":
        result: tuple[Tensor, Tensor] = torch.ops.internlm_native.attention(
            *map(_numbers_side_by_side, (q, k, v)), cu_seqlens, window, scale
        )
        return result
    if kernel == "wide":
        out, partition = _attention(q.float(), k.float(), v.float(), cu_seqlens, window, scale, _wide_kernel(window))
        return out.to(q.dtype), partition
    if cu_seqlens is None:
        return _rows(q, k, v, window, scale, kernel)
    out, partition = _attention_outputs(q, k, v, cu_seqlens, window, scale, kernel)
    for documents, length in _batches(cu_seqlens, q.dtype):
        own_q, own_k, own_v = (stack_documents(x, documents, length) for x in (q, k, v))
        own_out, own_partition = _rows(own_q, own_k, own_v, window, scale, kernel)
        unstack_documents(own_out, documents, out)
        if kernel == "flash":
            unstack_documents(own_partition.transpose(1, 2), documents, partition.transpose(1, 2))
    return out, partition


@_attention.register_fake
def _attention_outputs(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, window: int | None, scale: float, kernel: str
) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    kept = 0 if _has_no_partition(kernel, window) else length
    partition = q.new_empty((batch, heads, kept), dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape), partition


@torch.library.custom_op(
    "internlm::cpu_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor partition, Tensor? cu_seqlens, int? window,"
    " float scale, str kernel) -> (Tensor, Tensor, Tensor)",
)
def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    partition: Tensor,
    cu_seqlens: Tensor | None,
    window: int | None,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if kernel == "native":
        results: tuple[Tensor, Tensor, Tensor] = torch.ops.internlm_native.attention_backward(
            *map(_numbers_side_by_side, (grad, q, k, v, out)), partition, cu_seqlens, window, scale
        )
        return results
    if kernel == "wide":
        wide = (x.float() for x in (grad, q, k, v, out))
        grads = _attention_backward(*wide, partition, cu_seqlens, window, scale, _wide_kernel(window))
        return tuple(x.to(q.dtype) for x in grads)
    if cu_seqlens is None:
        return _rows_backward(grad, q, k, v, out, partition, window, scale, kernel)
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    for documents, length in _batches(cu_seqlens, q.dtype):
        own_grad, own_q, own_k, own_v, own_out = (stack_documents(x, documents, length) for x in (grad, q, k, v, out))
        own_partition = partition
        if kernel == "flash":
            own_partition = stack_documents(partition.transpose(1, 2), documents, length).transpose(1, 2)
        own_grads = _rows_backward(own_grad, own_q, own_k, own_v, own_out, own_partition, window, scale, kernel)
        for rows, whole in zip(own_grads, grads, strict=True):
            unstack_documents(rows, documents, whole)
    return grads


@_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _wide_kernel(window: int | None) -> CpuKernel:
    return "flash" if window is None else "blocks"


def _has_no_partition(kernel: str, window: int | None) -> bool:
    return kernel == "blocks" or (kernel == "wide" and window is not None)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, ctx.window, ctx.scale, ctx.kernel = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out, partition, cu_seqlens = ctx.saved_tensors
    grads = _attention_backward(grad, q, k, v, out, partition, cu_seqlens, ctx.window, ctx.scale, ctx.kernel)
    return *grads, None, None, None, None


_attention.register_autograd(_differentiate, setup_context=_save_for_backward)


def _rows(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float, kernel: str) -> tuple[Tensor, Tensor]:
    """Attention of equally long rows, as `_attention`."""
    nothing = _attention_outputs(q, k, v, None, window, scale, "blocks")[1]
    if window is not None:
        return blocked_forward(q, k, v, window, scale), nothing
    out, partition = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(_by_head(x) for x in (q, k, v)), 0.0, True, scale=scale
    )
    return out.transpose(1, 2).contiguous(), nothing if kernel == "blocks" else partition.contiguous()


def _rows_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    partition: Tensor,
    window: int | None,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if kernel == "blocks":
        return blocked_backward(grad, q, k, v, window, scale)
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(_by_head(x) for x in (grad, q, k, v, out)), partition, 0.0, True, scale=scale
    )
    grad_q, grad_k, grad_v = (x.transpose(1, 2).contiguous() for x in grads)
    return grad_q, grad_k, grad_v


def _by_head(x: Tensor) -> Tensor:
    """`[B, S, H, D]` -> `[B, H, S, D]`, as PyTorch's kernel reads it."""
    return _numbers_side_by_side(x).transpose(1, 2)


def _numbers_side_by_side(x: Tensor) -> Tensor:
    """The numbers of a head side by side: kernels do not look at their stride, which is 0 in the gradient of a sum."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _batches(cu_seqlens: Tensor, dtype: torch.dtype) -> list[tuple[Documents, int]]:
    return batches_of_documents(cu_seqlens.tolist(), _LENGTH_MULTIPLE if dtype == torch.bfloat16 else 1)


Documents = Sequence[tuple[int, int]]
"""Where documents of one row begin and end."""


def batches_of_documents(bounds: Sequence[int], multiple: int = 1) -> list[tuple[Documents, int]]:
    """Documents that make one batch, and the length that they are padded to.

    Args:
        bounds: where the documents begin and end, from 0.
        multiple: lengths are rounded up to a multiple of this.
    """
    batches: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for start, stop in itertools.pairwise(bounds):
        if stop > start:
            batches[-(-(stop - start) // multiple) * multiple].append((start, stop))
    return [(documents, length) for length, documents in batches.items()]


def stack_documents(x: Tensor, documents: Documents, length: int) -> Tensor:
    """Parts of one row `[1, S, ...]` as rows `[n, length, ...]`, padded to the right with zeros; a view if possible.

    Causal queries do not look there, and the gradient of what lies there is zero, so it changes no result.
    """
    together = _side_by_side(x, documents, length)
    if together is not None:
        return together
    after = (0, 0) * (x.dim() - 2)
    return torch.stack([F.pad(x[0, start:stop], (*after, 0, length - (stop - start))) for start, stop in documents])


def unstack_documents(rows: Tensor, documents: Documents, x: Tensor) -> None:
    """Write rows `[n, length, ...]` back to their places in `[1, S, ...]`."""
    together = _side_by_side(x, documents, rows.shape[1])
    if together is not None:
        together.copy_(rows)
        return
    for row, (start, stop) in zip(rows, documents, strict=True):
        x[0, start:stop] = row[: stop - start]


def _side_by_side(x: Tensor, documents: Documents, length: int) -> Tensor | None:
    """The documents as a view `[n, length, ...]` of `[1, S, ...]`; None unless all fill `length` and leave no gap."""
    first, last = documents[0][0], documents[-1][1]
    starts = [start for start, _ in documents]
    if starts != list(range(first, last, length)) or any(stop - start != length for start, stop in documents):
        return None
    return x[0, first:last].unflatten(0, (len(documents), length))
