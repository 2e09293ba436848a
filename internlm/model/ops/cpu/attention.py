"""Causal attention on CPU, dense or packed, as one operator with an explicit backward.

`internlm::cpu_attention` and its backward are each one node for torch.compile and for selective recomputation. They run
one of these kernels:

- "native": own C++ kernel, for bf16 on CPUs with AMX or AVX512-BF16; all documents in one call;
- "flash": PyTorch's flash attention, one call for all documents of equal length;
- "wide": the same in fp32, rounded once, for 16-bit dtypes that the CPU has no units for;
- "blocks": batched GEMMs over blocks of queries, one call for all documents of equal length (bf16: equal after
  padding); for bf16 backward passes without the native kernel, and for windows.

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
"""16-bit kernels are compiled for each new shape; padding documents to a multiple of this gives few shapes."""


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
        cu_seqlens: int32 `[n + 1]` on CPU, bounds of the documents of the only row (B = 1); None: each row is one
            document.
        window: maximum number of keys that a query attends to, itself included; None: no limit.
        scale: factor on the scores; None: 1 / sqrt(D).
        kernel: see the module docstring. Without a window, "blocks" runs its forward pass with "flash"; with a window,
            "flash", which does not support it, is replaced by "blocks".

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
    """The result, and the log-sum-exp of the scores `[B, H, S]`; empty for "blocks", which recomputes it."""
    if kernel == "native":
        result: tuple[Tensor, Tensor] = torch.ops.internlm_native.attention(
            *map(with_dense_heads, (q, k, v)), cu_seqlens, window, scale
        )
        return result
    if kernel == "wide":
        out, lse = _attention(q.float(), k.float(), v.float(), cu_seqlens, window, scale, _wide_kernel(window))
        return out.to(q.dtype), lse
    if cu_seqlens is None:
        return _rows(q, k, v, window, scale, kernel)
    out, lse = _attention_outputs(q, k, v, cu_seqlens, window, scale, kernel)
    for documents, length in _batches(cu_seqlens, q.dtype):
        own_q, own_k, own_v = (stack_documents(x, documents, length) for x in (q, k, v))
        own_out, own_lse = _rows(own_q, own_k, own_v, window, scale, kernel)
        unstack_documents(own_out, documents, out)
        if kernel == "flash":
            unstack_documents(own_lse.transpose(1, 2), documents, lse.transpose(1, 2))
    return out, lse


@_attention.register_fake
def _attention_outputs(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, window: int | None, scale: float, kernel: str
) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    lse_length = 0 if _has_no_lse(kernel, window) else length
    lse = q.new_empty((batch, heads, lse_length), dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape), lse


@torch.library.custom_op(
    "internlm::cpu_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? cu_seqlens, int? window,"
    " float scale, str kernel) -> (Tensor, Tensor, Tensor)",
)
def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    window: int | None,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if kernel == "native":
        results: tuple[Tensor, Tensor, Tensor] = torch.ops.internlm_native.attention_backward(
            *map(with_dense_heads, (grad, q, k, v, out)), lse, cu_seqlens, window, scale
        )
        return results
    if kernel == "wide":
        wide = (x.float() for x in (grad, q, k, v, out))
        grads = _attention_backward(*wide, lse, cu_seqlens, window, scale, _wide_kernel(window))
        return tuple(x.to(q.dtype) for x in grads)
    if cu_seqlens is None:
        return _rows_backward(grad, q, k, v, out, lse, window, scale, kernel)
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    for documents, length in _batches(cu_seqlens, q.dtype):
        own_grad, own_q, own_k, own_v, own_out = (stack_documents(x, documents, length) for x in (grad, q, k, v, out))
        own_lse = lse
        if kernel == "flash":
            own_lse = stack_documents(lse.transpose(1, 2), documents, length).transpose(1, 2)
        own_grads = _rows_backward(own_grad, own_q, own_k, own_v, own_out, own_lse, window, scale, kernel)
        for rows, target in zip(own_grads, grads, strict=True):
            unstack_documents(rows, documents, target)
    return grads


@_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _wide_kernel(window: int | None) -> CpuKernel:
    return "flash" if window is None else "blocks"


def _has_no_lse(kernel: str, window: int | None) -> bool:
    return kernel == "blocks" or (kernel == "wide" and window is not None)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, ctx.window, ctx.scale, ctx.kernel = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
    grads = _attention_backward(grad, q, k, v, out, lse, cu_seqlens, ctx.window, ctx.scale, ctx.kernel)
    return *grads, None, None, None, None


_attention.register_autograd(_differentiate, setup_context=_save_for_backward)


def _rows(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float, kernel: str) -> tuple[Tensor, Tensor]:
    """Attention of rows of equal length; results as of `_attention`."""
    no_lse = _attention_outputs(q, k, v, None, window, scale, "blocks")[1]
    if window is not None:
        return blocked_forward(q, k, v, window, scale), no_lse
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(_by_head(x) for x in (q, k, v)), 0.0, True, scale=scale
    )
    return out.transpose(1, 2).contiguous(), no_lse if kernel == "blocks" else lse.contiguous()


def _rows_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    window: int | None,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if kernel == "blocks":
        return blocked_backward(grad, q, k, v, window, scale)
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(_by_head(x) for x in (grad, q, k, v, out)), lse, 0.0, True, scale=scale
    )
    grad_q, grad_k, grad_v = (x.transpose(1, 2).contiguous() for x in grads)
    return grad_q, grad_k, grad_v


def _by_head(x: Tensor) -> Tensor:
    """`[B, S, H, D]` -> `[B, H, S, D]`, the layout of PyTorch's kernel."""
    return with_dense_heads(x).transpose(1, 2)


def with_dense_heads(x: Tensor) -> Tensor:
    """x with stride 1 in the last dimension, which kernels assume; it is 0 in the gradient of a sum."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _batches(cu_seqlens: Tensor, dtype: torch.dtype) -> list[tuple[Documents, int]]:
    return batches_of_documents(cu_seqlens.tolist(), _LENGTH_MULTIPLE if dtype == torch.bfloat16 else 1)


Documents = Sequence[tuple[int, int]]
"""(start, stop) of documents in a row."""


def batches_of_documents(bounds: Sequence[int], multiple: int = 1) -> list[tuple[Documents, int]]:
    """(documents, padded length) of each batch of documents of equal padded length; empty documents are left out.

    Args:
        bounds: the n + 1 bounds of the documents, from 0.
        multiple: lengths are rounded up to a multiple of this.
    """
    batches: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for start, stop in itertools.pairwise(bounds):
        if stop > start:
            batches[-(-(stop - start) // multiple) * multiple].append((start, stop))
    return [(documents, length) for length, documents in batches.items()]


def stack_documents(x: Tensor, documents: Documents, length: int) -> Tensor:
    """Documents of one row `[1, S, ...]` as rows `[n, length, ...]`, right-padded with zeros; a view if possible.

    Padding changes no result: causal queries do not attend to it, and the gradient of padded outputs is zero.
    """
    view = _contiguous_documents(x, documents, length)
    if view is not None:
        return view
    after = (0, 0) * (x.dim() - 2)
    return torch.stack([F.pad(x[0, start:stop], (*after, 0, length - (stop - start))) for start, stop in documents])


def unstack_documents(rows: Tensor, documents: Documents, x: Tensor) -> None:
    """Write rows `[n, length, ...]` back to their documents in `x`, `[1, S, ...]`."""
    view = _contiguous_documents(x, documents, rows.shape[1])
    if view is not None:
        view.copy_(rows)
        return
    for row, (start, stop) in zip(rows, documents, strict=True):
        x[0, start:stop] = row[: stop - start]


def _contiguous_documents(x: Tensor, documents: Documents, length: int) -> Tensor | None:
    """The documents as a view `[n, length, ...]` of `[1, S, ...]`; None unless all have `length` tokens and no gaps."""
    first, last = documents[0][0], documents[-1][1]
    starts = [start for start, _ in documents]
    if starts != list(range(first, last, length)) or any(stop - start != length for start, stop in documents):
        return None
    return x[0, first:last].unflatten(0, (len(documents), length))
