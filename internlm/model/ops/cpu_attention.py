"""Causal attention on CPU, dense or packed, as one operator with an explicit backward.

`internlm::cpu_attention` and its backward are each one node to torch.compile and to selective recomputation. Documents
of equal length (16-bit ones: of equal length but for padding) make one call of a kernel: PyTorch's flash attention, or
batched matrix products by blocks of queries: in 16-bit backward passes, where that is faster, and under a window.

Shapes: B sequences, S tokens, H query heads, K key-value heads (H a multiple of K), D head dimension.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from internlm.model.ops.blocked_attention import blocked_backward, blocked_forward

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
    by_blocks: bool,
) -> Tensor:
    """Causal attention of rows, or of the documents in one row.

    Args:
        q: `[B, S, H, D]` on CPU.
        k, v: `[B, S, K, D]`.
        cu_seqlens: int32 `[n + 1]` on CPU, where the documents of the one row (B = 1) begin and end; None: each row is
            one document.
        window: keys that a query sees at most, itself included; None: all before it.
        scale: factor of the scores; None: 1 / sqrt(D).
        by_blocks: go backward by blocks of queries instead of by PyTorch's flash kernel. With a window, which that
            kernel does not know, both passes go by blocks.

    Returns:
        `[B, S, H, D]`, contiguous.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if window is not None and window >= q.shape[1]:
        window = None
    out, _ = _attention(q, k, v, cu_seqlens, window, scale, by_blocks or window is not None)
    return out


@torch.library.custom_op(
    "internlm::cpu_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, int? window, float scale, bool by_blocks)"
    " -> (Tensor, Tensor)",
)
def _attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, window: int | None, scale: float, by_blocks: bool
) -> tuple[Tensor, Tensor]:
    """The result, and the logarithms of the scores' partitions `[B, H, S]` (none by blocks, which make them again)."""
    if cu_seqlens is None:
        return _rows(q, k, v, window, scale, by_blocks)
    out, partition = _attention_outputs(q, k, v, cu_seqlens, window, scale, by_blocks)
    for documents, length in _batches(cu_seqlens, q.dtype):
        own_q, own_k, own_v = (stack_documents(x, documents, length) for x in (q, k, v))
        own_out, own_partition = _rows(own_q, own_k, own_v, window, scale, by_blocks)
        unstack_documents(own_out, documents, out)
        if not by_blocks:
            unstack_documents(own_partition.transpose(1, 2), documents, partition.transpose(1, 2))
    return out, partition


@_attention.register_fake
def _attention_outputs(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, window: int | None, scale: float, by_blocks: bool
) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    partition = q.new_empty(
        (batch, heads, 0 if by_blocks else length), dtype=torch.promote_types(q.dtype, torch.float32)
    )
    return q.new_empty(q.shape), partition


@torch.library.custom_op(
    "internlm::cpu_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor partition, Tensor? cu_seqlens, int? window,"
    " float scale, bool by_blocks) -> (Tensor, Tensor, Tensor)",
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
    by_blocks: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if cu_seqlens is None:
        return _rows_backward(grad, q, k, v, out, partition, window, scale, by_blocks)
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    for documents, length in _batches(cu_seqlens, q.dtype):
        own_grad, own_q, own_k, own_v, own_out = (stack_documents(x, documents, length) for x in (grad, q, k, v, out))
        own_partition = partition
        if not by_blocks:
            own_partition = stack_documents(partition.transpose(1, 2), documents, length).transpose(1, 2)
        own_grads = _rows_backward(own_grad, own_q, own_k, own_v, own_out, own_partition, window, scale, by_blocks)
        for rows, whole in zip(own_grads, grads, strict=True):
            unstack_documents(rows, documents, whole)
    return grads


@_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, ctx.window, ctx.scale, ctx.by_blocks = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out, partition, cu_seqlens = ctx.saved_tensors
    grads = _attention_backward(grad, q, k, v, out, partition, cu_seqlens, ctx.window, ctx.scale, ctx.by_blocks)
    return *grads, None, None, None, None


_attention.register_autograd(_differentiate, setup_context=_save_for_backward)


def _rows(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float, by_blocks: bool) -> tuple[Tensor, Tensor]:
    """Attention of equally long rows, as `_attention`."""
    nothing = _attention_outputs(q, k, v, None, window, scale, True)[1]
    if window is not None:
        return blocked_forward(q, k, v, window, scale), nothing
    out, partition = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(_by_head(x) for x in (q, k, v)), 0.0, True, scale=scale
    )
    return out.transpose(1, 2).contiguous(), nothing if by_blocks else partition.contiguous()


def _rows_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    partition: Tensor,
    window: int | None,
    scale: float,
    by_blocks: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if by_blocks:
        return blocked_backward(grad, q, k, v, window, scale)
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(_by_head(x) for x in (grad, q, k, v, out)), partition, 0.0, True, scale=scale
    )
    grad_q, grad_k, grad_v = (x.transpose(1, 2).contiguous() for x in grads)
    return grad_q, grad_k, grad_v


def _by_head(x: Tensor) -> Tensor:
    """`[B, S, H, D]` -> `[B, H, S, D]`, as PyTorch's kernel reads it: with the numbers of a head side by side. It does
    not look at their stride, which is 0 in the gradient of a sum."""
    return (x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2)


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
