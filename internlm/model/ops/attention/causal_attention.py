"""Causal attention, dense or over packed documents, with grouped heads, sliding windows and a key-value cache.

Shapes: B sequences, S tokens, H query heads, K key-value heads (H a multiple of K), D head dimension.

Packed documents are not computed with a mask over the whole row. On CUDA, a variable-length kernel takes them in one
call (see `cuda_backends.py`); on CPU, one of the kernels in `cpu/attention.py`. On other devices, PyTorch's scaled dot
product attention (SDPA) is called once for all documents of equal length.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from internlm.model.ops import reference
from internlm.model.ops.attention.cuda_backends import (
    BACKEND_BY_NAME,
    AttentionNeeds,
    backend_for,
    capability_of,
    choose_attention,
    packed_attention,
    reason_of,
)
from internlm.model.ops.compiling import constant_when_compiled
from internlm.model.ops.cpu import gemm as cpu_gemm
from internlm.model.ops.cpu.attention import (
    CpuKernel,
    batches_of_documents,
    cpu_attention,
    stack_documents,
    unstack_documents,
)
from internlm.model.ops.cpu.gemm import widens
from internlm.model.ops.cpu.native import has_bf16_units, has_native_ops, why_no_native_ops
from internlm.model.ops.implementation_choice import Choice

_BAND = 64
"""Minimum number of queries per SDPA call with a window."""

_MIN_ROW = 1024
"""Shortest length of equal packed documents that are computed as rows; in short ones, cuDNN's kernel is not faster."""

_MIN_ROUNDED_DOCUMENTS = 16
"""Smallest number of documents in `VarlenMetadata.rounded`: empty ones cost little, a new shape costs a recording."""

_CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""SDPA's order of kernels on GPUs where cuDNN's is the fastest."""

_SLOWER_THAN_CUDNN = ("flash-attn-2", "torch-varlen")
"""Backends for packed rows that take twice the time of cuDNN's kernel for rows, where that is SDPA's fastest."""


@dataclass(frozen=True)
class VarlenMetadata:
    """The documents of a packed sequence `[1, P]`, in order.

    Attributes:
        cu_seqlens: int32 `[n + 1]` on the device, from 0 to P.
        lengths: the n lengths as host integers, so that nothing waits for the device. Zeros are allowed.
        max_seqlen: an upper bound on the lengths, such as their maximum.
        token_indices: int64 `[1, S]` on the device, where a rank has a part of the sequence: the indices of its tokens.
            None: it has all.
    """

    cu_seqlens: Tensor
    lengths: tuple[int, ...]
    max_seqlen: int
    token_indices: Tensor | None = None

    @classmethod
    def of(cls, lengths: tuple[int, ...], cu_seqlens: Tensor | None = None) -> VarlenMetadata:
        """The metadata of these lengths; `cu_seqlens` is computed on the CPU if it is not given."""
        if cu_seqlens is None:
            cu_seqlens = F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))
        return cls(cu_seqlens, tuple(lengths), max(lengths, default=0))

    def rounded(self) -> VarlenMetadata:
        """The same documents with rounded shapes, so that few different shapes occur.

        Empty documents at the end round the number of documents up to a power of two, at least
        `_MIN_ROUNDED_DOCUMENTS`; `max_seqlen` is rounded up to a power of two, at most the length of the row.
        """
        num_tokens, num_documents = sum(self.lengths), len(self.lengths)
        num_empty = _next_power_of_two(max(num_documents, _MIN_ROUNDED_DOCUMENTS)) - num_documents
        return VarlenMetadata(
            F.pad(self.cu_seqlens, (0, num_empty), value=num_tokens),
            self.lengths + (0,) * num_empty,
            min(_next_power_of_two(self.max_seqlen), num_tokens),
        )


def _next_power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << max(number - 1, 0).bit_length()


@constant_when_compiled
def _cpu_kernel(dtype: torch.dtype) -> CpuKernel:
    """The kernel for rows of this dtype on this CPU."""
    if dtype == torch.bfloat16 and has_bf16_units() and has_native_ops():
        return "native"
    if widens(torch.device("cpu"), dtype):
        return "wide"
    return "blocks" if dtype == torch.bfloat16 and has_bf16_units() else "flash"


def choice(
    device: torch.device, needs: AttentionNeeds, *, attention_backend: str = "auto", use_flash_attn: bool = True
) -> Choice:
    """The implementation of `attention`.

    Raises:
        ConfigError: the configured backend cannot be used.
    """
    if device.type == "cuda":
        packed = BACKEND_BY_NAME[choose_attention(needs, attention_backend, use_flash_attn)]
        reason = reason_of(packed, needs, wanted=attention_backend, use_flash_attn=use_flash_attn)
        if attention_backend != "auto":
            return Choice(packed.implementation, reason)
        rows = "rows"
        if _prefers_cudnn(needs.capability) and packed.name in _SLOWER_THAN_CUDNN:
            rows = f"rows, and packed documents of one length from {_MIN_ROW} tokens on"
        return Choice(f"{rows}: SDPA ({_sdpa_kernels(needs)}); packed or windowed: {packed.implementation}", reason)
    # Not an error: a config for GPUs also runs on CPUs.
    ignored = "" if attention_backend == "auto" else f"; model.attention_backend = {attention_backend!r} is for GPUs"
    if device.type == "cpu" and _cpu_kernel(needs.dtype) == "native":
        return Choice("own C++ kernel, all documents in one call", f"this CPU has bf16 units{ignored}")
    if device.type == "cpu" and _cpu_kernel(needs.dtype) == "wide":
        return Choice("SDPA in fp32, one call per document length", f"{cpu_gemm.choice(needs.dtype).reason}{ignored}")
    if device.type == "cpu" and _cpu_kernel(needs.dtype) == "blocks":
        return Choice(
            "SDPA, one call per document length; backward by blocks of queries",
            f"this CPU has bf16 units; no C++ kernel: {why_no_native_ops()}{ignored}",
        )
    return Choice(
        "SDPA, one call per document length", f"PyTorch has no variable-length kernel on {device.type}{ignored}"
    )


def _sdpa_kernels(needs: AttentionNeeds) -> str:
    return "cuDNN's kernel first" if _prefers_cudnn(needs.capability) else "PyTorch's order of kernels"


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    varlen: VarlenMetadata | None = None,
    *,
    window: int | None = None,
    scale: float | None = None,
    attention_backend: str = "auto",
    use_flash_attn: bool = True,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    varlen: VarlenMetadata | None = None,
    *,
    window: int | None = None,
    scale: float | None = None,
    attention_backend: str = "auto",
    use_flash_attn: bool = True,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    varlen: VarlenMetadata | None = None,
    *,
    window: int | None = None,
    scale: float | None = None,
    attention_backend: str = "auto",
    use_flash_attn: bool = True,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal softmax attention.

    Args:
        q: `[B, S, H, D]`.
        k, v: `[B, T, K, D]` with T >= S. If T > S (cached keys), the queries are the last S positions. Query head i
            uses key-value head i // (H / K).
        varlen: the documents of a packed sequence (B = 1, T = S); None: every row is one document.
        window: maximum number of keys that a query attends to, itself included; None: no limit.
        scale: factor on the scores; None: 1 / sqrt(D).
        attention_backend: on CUDA, without a cache: a name in `BACKENDS`, or "auto".
        use_flash_attn: whether "auto" may choose the flash-attn packages.
        return_lse: also return the log-sum-exp of each query's scores, with which results over parts of the keys can be
            merged. Uses the reference implementation, document by document, so memory grows with the square of the
            longest document.

    Returns:
        `[B, S, H, D]` in the dtype of q; with `return_lse` also fp32 (float64 for float64) `[B, S, H]`. Both are
        differentiable.

    Raises:
        ValueError: `return_lse` with a backend that does not return it.
    """
    assert window is None or window > 0
    if varlen is not None:
        assert q.shape[0] == 1 and q.shape[1] == k.shape[1], "packed attention takes one row and no cache"
        # Not in a compiled block, which would be recompiled for other lengths.
        assert torch.compiler.is_compiling() or sum(varlen.lengths) == q.shape[1], (
            "varlen.lengths do not add up to the packed length"
        )
    if return_lse:
        if q.is_cuda and attention_backend not in ("auto", "sdpa"):
            raise ValueError(
                f"attention(return_lse=True): the backend {attention_backend!r} does not return the log-sum-exp; use "
                f'attention_backend="sdpa" or "auto"'
            )
        return _with_lse(q, k, v, varlen, window, scale)
    if q.is_cuda and q.shape[1] == k.shape[1]:
        return _on_cuda(q, k, v, varlen, window, scale, attention_backend, use_flash_attn)
    if q.device.type == "cpu" and q.shape[1] == k.shape[1]:
        bounds = None if varlen is None else varlen.cu_seqlens
        return cpu_attention(q, k, v, bounds, window=window, scale=scale, kernel=_cpu_kernel(q.dtype))
    if varlen is not None:
        return _by_document(q, k, v, varlen, window, scale)
    return _dense(q, k, v, window, scale)


def _on_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    varlen: VarlenMetadata | None,
    window: int | None,
    scale: float | None,
    attention_backend: str,
    use_flash_attn: bool,
) -> Tensor:
    """Attention without a cache on CUDA."""
    name = backend_for(
        q.device,
        q.dtype,
        q.shape[-1],
        packed=varlen is not None or window is not None,
        # Without varlen metadata, the SDPA calls are the same in every batch.
        compiled=varlen is not None and torch.compiler.is_compiling(),
        wanted=attention_backend,
        use_flash_attn=use_flash_attn,
    )
    # cuDNN builds a plan for each new shape, and only training has few shapes.
    prefers_cudnn = window is None and torch.is_grad_enabled() and _cudnn_first(q.device)
    if prefers_cudnn and varlen is not None and attention_backend == "auto" and name in _SLOWER_THAN_CUDNN:
        num_documents, longest = varlen.cu_seqlens.shape[0] - 1, varlen.max_seqlen
        # True only if all documents have that length, which then divides the packed one: still few shapes.
        if num_documents * longest == q.shape[1] and longest >= _MIN_ROW:
            q, k, v = (x.unflatten(1, (num_documents, longest)).squeeze(0) for x in (q, k, v))
            with sdpa_kernel(_CUDNN_FIRST, set_priority=True):
                return _sdpa(q, k, v, scale).flatten(0, 1).unsqueeze(0)
    if name == "sdpa":
        if varlen is not None:
            return _by_document(q, k, v, varlen, window, scale)
        if prefers_cudnn:
            with sdpa_kernel(_CUDNN_FIRST, set_priority=True):
                return _dense(q, k, v, window, scale)
        return _dense(q, k, v, window, scale)
    batch, length = q.shape[:2]
    if varlen is None:
        bounds, longest = torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=q.device), length
    else:
        bounds, longest = varlen.cu_seqlens, varlen.max_seqlen
    flat_q, flat_k, flat_v = (x.flatten(0, 1) for x in (q, k, v))
    out = packed_attention(name, flat_q, flat_k, flat_v, bounds, longest, window, scale)
    return out.unflatten(0, (batch, length))


def _with_lse(
    q: Tensor, k: Tensor, v: Tensor, varlen: VarlenMetadata | None, window: int | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """The reference implementation in fp32 or float64, one document at a time."""
    wide = torch.promote_types(q.dtype, torch.float32)
    if varlen is None:
        out, lse = reference.attention_with_lse(q.to(wide), k.to(wide), v.to(wide), window=window, scale=scale)
        return out.to(q.dtype), lse
    documents = [x.to(wide).split(list(varlen.lengths), dim=1) for x in (q, k, v)]
    parts = [reference.attention_with_lse(*own, window=window, scale=scale) for own in zip(*documents, strict=True)]
    return torch.cat([out for out, _ in parts], dim=1).to(q.dtype), torch.cat([lse for _, lse in parts], dim=1)


@constant_when_compiled
def _cudnn_first(device: torch.device) -> bool:
    return _prefers_cudnn(capability_of(device))


def _prefers_cudnn(capability: tuple[int, int] | None) -> bool:
    """Whether cuDNN's kernel is SDPA's fastest on a GPU: Hopper and later."""
    return capability is not None and capability[0] >= 9


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float | None, *, mask: Tensor | None = None) -> Tensor:
    """SDPA in this module's layout: causal without a mask (S = T), or with a boolean mask `[S, T]` (True: attended)."""
    is_causal = mask is None
    # A single query attends to every key: without the flag, the kernel does no masking. A branch, as a compiler would
    # make a comparison symbolic, which SDPA refuses.
    if q.shape[1] == 1:
        is_causal = False
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def _dense(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float | None) -> Tensor:
    """Rows of equal length with SDPA, with or without a cache and a window."""
    num_queries, num_keys = q.shape[1], k.shape[1]
    if window is not None and window >= num_keys:
        window = None
    if window is None:
        if num_queries in (1, num_keys):
            return _sdpa(q, k, v, scale)
        return _sdpa(q, k, v, scale, mask=_band(num_queries, num_keys, None, q.device))
    # A band of queries needs only its own keys and the window before them, so work and mask grow with S x window.
    offset = num_keys - num_queries
    size = max(window, _BAND)
    bands = []
    for start in range(0, num_queries, size):
        stop = min(start + size, num_queries)
        first_key = max(0, offset + start - window + 1)
        keys = slice(first_key, offset + stop)
        mask = _band(stop - start, offset + stop - first_key, window, q.device)
        bands.append(_sdpa(q[:, start:stop], k[:, keys], v[:, keys], scale, mask=mask))
    return bands[0] if len(bands) == 1 else torch.cat(bands, dim=1)


def _band(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """Boolean causal mask `[num_queries, num_keys]`; the last query is at the position of the last key."""
    distance = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None] - torch.arange(
        num_keys, device=device
    )
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)


def _by_document(
    q: Tensor, k: Tensor, v: Tensor, varlen: VarlenMetadata, window: int | None, scale: float | None
) -> Tensor:
    """Packed attention as one SDPA call for each distinct document length."""
    out = torch.empty_like(q)
    bounds = list(itertools.accumulate(varlen.lengths, initial=0))
    for documents, length in batches_of_documents(bounds):
        own_q, own_k, own_v = (stack_documents(x, documents, length) for x in (q, k, v))
        unstack_documents(_dense(own_q, own_k, own_v, window, scale), documents, out)
    return out
