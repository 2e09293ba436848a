"""Attention of queries to some of their keys, merged into a running result; forward and backward.

Attention over parts of the keys is exact: with results o_a, o_b and log-sum-exps l_a, l_b of the scores over two parts,

    l = log(exp(l_a) + exp(l_b)),    o = o_a + sigmoid(l_b - l_a) (o_b - o_a),

where no exponential overflows. Source: Liu et al. 2023, ring attention, https://arxiv.org/abs/2310.01889. In the
backward pass of flash attention (https://arxiv.org/abs/2307.08691), gradients are sums over keys once o and l over all
keys are known, so those of parts are added.

Which queries see which keys is a list of tiles (`attention_tiles.py`). Nothing here knows ranks or documents.

Shapes: Sq queries, Sk keys, H query heads, K key-value heads (H a multiple of K), D head dimension of queries and keys,
D' of values. Query head i uses key-value head i // (H / K).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from internlm.model.ops.attention.attention_tiles import Tile, TileBatch, batches, trimmed
from internlm.model.ops.attention.cuda_backends import capability_of
from internlm.model.ops.attention.partial_kernels import BatchedGemms, CpuFlash, CudaFlash, PartialKernel
from internlm.model.ops.cpu.attention import with_dense_heads
from internlm.model.ops.cpu.native import has_bf16_units, has_native_ops
from internlm.model.ops.implementation_choice import Choice

__all__ = ["Tile", "add_partial_attention", "choice", "partial_attention_backward"]

_SIXTEEN_BITS = (torch.float16, torch.bfloat16)

_LARGE_SHARED_MEMORY = ((8, 0), (9, 0), (10, 0))
"""Compute capabilities."""

_NO_WINDOW = 1 << 40


@torch.no_grad()
def add_partial_attention(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Sequence[Tile],
    *,
    window: int | None = None,
    scale: float | None = None,
) -> None:
    """Merge attention to the keys of `tiles` into a running result, in place and unseen by autograd.

    Args:
        out: `[Sq, H, D']`, fp32 (float64 for float64): the result over the keys so far, at first 0.
        lse: `[Sq, H]` in the dtype of `out`: the log-sum-exp of the scores so far, at first -inf.
        q: `[Sq, H, D]`.
        k: `[Sk, K, D]`.
        v: `[Sk, K, D']`.
        tiles: which queries see which keys; no pair of a query and a key may be in two of them. Queries that see no key
            of any tile stay as they are.
        window: maximum number of keys that a query attends to, itself included, in tiles with a distance; None: no
            limit.
        scale: factor on the scores; None: 1 / sqrt(D).
    """
    scale = _scale(q, scale)
    if _is_native(q.device, q.dtype):
        inputs = (with_dense_heads(x) for x in (q, k, v))
        torch.ops.internlm_native.add_partial_attention(out, lse, *inputs, _flat(tiles, window), scale)
        return
    kernel = _kernel(q.device, q.dtype, max(q.shape[-1], v.shape[-1]))
    q, k, v = _prepared(kernel, q.dtype, q, k, v)
    for batch in _batches(kernel, tiles, window, q):
        own_out, own_lse = kernel.forward(batch.queries(q), batch.keys(k), batch.keys(v), batch.first, window, scale)
        _merge(batch.queries(out), batch.queries(lse), own_out[..., : out.shape[-1]], own_lse)


@torch.no_grad()
def partial_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tiles: Sequence[Tile],
    *,
    window: int | None = None,
    scale: float | None = None,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
) -> None:
    """Add what the keys of `tiles` contribute to the gradients, in place.

    Args:
        grad_out: `[Sq, H, D']`, the gradient of the result.
        q, k, v, tiles, window, scale: see `add_partial_attention`.
        out: `[Sq, H, D']` in any dtype: the result over all keys of each query, not only those of `tiles`.
        lse: `[Sq, H]`, fp32 or float64: the log-sum-exp over all keys. With attention sinks, both include the sink.
        grad_q, grad_k, grad_v: fp32 (float64 for float64), in the shapes of q, k and v.
    """
    scale = _scale(q, scale)
    if _is_native(q.device, q.dtype):
        inputs = (with_dense_heads(x) for x in (grad_out.to(q.dtype), q, k, v, out.float()))
        torch.ops.internlm_native.partial_attention_backward(
            *inputs, lse, _flat(tiles, window), scale, grad_q, grad_k, grad_v
        )
        return
    kernel = _kernel(q.device, q.dtype, max(q.shape[-1], v.shape[-1]))
    grad_out, q, k, v, out = _prepared(kernel, q.dtype, grad_out, q, k, v, out)
    for batch in _batches(kernel, tiles, window, q):
        own_q, own_k, own_v = kernel.backward(
            batch.queries(grad_out),
            batch.queries(q),
            batch.keys(k),
            batch.keys(v),
            batch.queries(out),
            batch.queries(lse),
            batch.first,
            window,
            scale,
        )
        batch.queries(grad_q).add_(own_q[..., : grad_q.shape[-1]])
        batch.add_to_keys(grad_k, own_k[..., : grad_k.shape[-1]])
        batch.add_to_keys(grad_v, own_v[..., : grad_v.shape[-1]])


def choice(device: torch.device, dtype: torch.dtype, head_dim: int) -> Choice:
    """The implementation of partial attention, for the larger one of D and D'."""
    if _is_native(device, dtype):
        return Choice("own C++ kernel, all tiles in one call", "this CPU has bf16 units")
    if device.type == "cpu":
        return Choice("PyTorch's flash attention in fp32, one call per tile shape", "parts are not rounded to 16 bits")
    if device.type != "cuda":
        return Choice("batched GEMMs in fp32", f"PyTorch has no flash attention on {device.type}")
    reason = _why_not_cuda_flash(capability_of(device), dtype, head_dim)
    if reason is not None:
        return Choice("batched GEMMs in fp32", f"PyTorch's flash attention {reason}")
    return Choice("PyTorch's flash attention 2, one call per shape of tile", "it takes the log-sum-exp over all keys")


def _is_native(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the C++ kernel is used, which takes all tiles at once and merges them itself."""
    return device.type == "cpu" and dtype == torch.bfloat16 and has_bf16_units() and has_native_ops()


def _flat(tiles: Sequence[Tile], window: int | None) -> list[int]:
    """The tiles as the C++ kernel takes them: six numbers each, the last two of which hide nothing from a full tile."""
    numbers: list[int] = []
    for tile in tiles:
        if (rest := trimmed(tile, window)) is not None:
            numbers += (rest.q_start, rest.q_stop, rest.k_start, rest.k_stop)
            numbers.append(rest.num_keys if rest.distance is None else rest.distance)
            numbers.append(_NO_WINDOW if rest.distance is None or window is None else window)
    return numbers


def _kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> PartialKernel:
    if device.type == "cpu":
        return CpuFlash()
    if device.type == "cuda" and _why_not_cuda_flash(capability_of(device), dtype, head_dim) is None:
        return CudaFlash()
    return BatchedGemms()


def _why_not_cuda_flash(capability: tuple[int, int] | None, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why PyTorch's flash attention on CUDA cannot be used; None if it can."""
    if capability is not None and capability < (8, 0):
        return f"needs compute capability 8.0 or later, this GPU has {capability[0]}.{capability[1]}"
    if dtype not in _SIXTEEN_BITS:
        return f"does not support {str(dtype).removeprefix('torch.')}"
    # Its backward pass of larger ones needs more shared memory than other GPUs have.
    largest = 256 if capability is None or capability in _LARGE_SHARED_MEMORY else 192
    if head_dim > largest:
        return f"supports head dimensions up to {largest} on this GPU, the model has {head_dim}"
    return None


def _scale(q: Tensor, scale: float | None) -> float:
    return 1 / math.sqrt(q.shape[-1]) if scale is None else scale


def _prepared(kernel: PartialKernel, dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """The tensors in the kernel's dtype, with one head dimension, padded with zeros, and stride 1 in it."""
    width = max(x.shape[-1] for x in tensors)
    width = -(-width // kernel.head_dim_multiple) * kernel.head_dim_multiple
    wide = (x.to(kernel.compute_dtype(dtype)) for x in tensors)
    padded = (F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in wide)
    return [x if x.stride(-1) == 1 else x.contiguous() for x in padded]


def _batches(kernel: PartialKernel, tiles: Sequence[Tile], window: int | None, q: Tensor) -> list[TileBatch]:
    return batches(kernel.split(tiles, window, q.shape[1]))


def _merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """Merge attention to other keys into `out` `[..., D']` and `lse` `[...]`, in place. `other_lse` is finite."""
    other_lse = other_lse.to(lse.dtype)
    share = torch.sigmoid(other_lse - lse).unsqueeze(-1)
    out.lerp_(other_out.to(out.dtype), share)
    torch.logaddexp(lse, other_lse, out=lse)
