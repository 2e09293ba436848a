"""Kernels for attention on CUDA as data: what each can do, whether it is there, in which order they are preferred.

A choice depends on what the model asks of attention (`AttentionNeeds`) and on the machine, never on a batch: it is made
once for each configuration of a process. The order of `BACKENDS` is the preference for packed and windowed rows:

1. flash-attn 3, written for Hopper; flash-attn 4, for Blackwell; flash-attn 2, newer than the copy of it in PyTorch;
2. PyTorch's varlen attention, that copy: nothing to install;
3. SDPA, one call a document length, where those kernels do not serve (fp32, old cards, odd head sizes); its calls
   follow the lengths of a batch, so compiled blocks go on to
4. flex attention, a Triton kernel for any dtype;
5. the formula itself, with a mask over the whole row.

Rows of equal length without a window go to SDPA, which has cuDNN's kernel, the fastest for them on Hopper and later.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import attention as torch_attention

from internlm.model.ops import reference
from internlm.model.ops.compiling import constant_when_compiled
from internlm.utils.errors import ConfigError
from internlm.utils.optional_packages import why_unusable

_SIXTEEN_BITS = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class AttentionNeeds:
    """What a model asks of attention on a CUDA device.

    Attributes:
        capability: the card's compute capability; None when there is no card to ask.
        dtype: of queries, keys and values.
        head_dim: D.
        packed: rows hold several documents, or a window: SDPA's own causal mask does not do.
        compiled: it runs inside a compiled block.
    """

    capability: tuple[int, int] | None
    dtype: torch.dtype
    head_dim: int
    packed: bool = True
    compiled: bool = False


@dataclass(frozen=True)
class AttentionBackend:
    """A kernel, by its name in `model.attention_backend`, and its limits.

    Attributes:
        module, attributes: what must be importable; an empty module is always there.
        install: how to get it; empty: it comes with PyTorch.
        capabilities: the first and the last major compute capability that it serves.
        dtypes: None: all.
        head_dims: the smallest and the largest head dimension; all are multiples of `head_dim_multiple`.
        is_flash_attn: a package that `model.use_flash_attn = False` rules out.
        implementation: what the log shows.
    """

    name: str
    implementation: str
    module: str = ""
    attributes: tuple[str, ...] = ()
    install: str = ""
    capabilities: tuple[int, int] = (0, 99)
    dtypes: tuple[torch.dtype, ...] | None = None
    head_dims: tuple[int, int] = (1, 1 << 30)
    head_dim_multiple: int = 1
    is_flash_attn: bool = False

    def refusal(self, needs: AttentionNeeds) -> str | None:
        """Why it cannot serve these needs on this machine; None when it can."""
        if needs.capability is not None and not self.capabilities[0] <= needs.capability[0] <= self.capabilities[1]:
            first, last = self.capabilities
            wanted = f"{first}.x" if first == last else f"{first}.x to {last}.x" if last < 99 else f"{first}.0 or later"
            return f"needs compute capability {wanted}, this card has {needs.capability[0]}.{needs.capability[1]}"
        if self.dtypes is not None and needs.dtype not in self.dtypes:
            return f"has no {_short(needs.dtype)} (only {', '.join(map(_short, self.dtypes))})"
        if not self.head_dims[0] <= needs.head_dim <= self.head_dims[1] or needs.head_dim % self.head_dim_multiple:
            step = f", multiples of {self.head_dim_multiple}" if self.head_dim_multiple > 1 else ""
            bounds = (
                f"{self.head_dims[0]} to {self.head_dims[1]}"
                if self.head_dims[1] < 1 << 30
                else (f"{self.head_dims[0]} or more")
            )
            return f"serves head dimensions {bounds}{step}, the model has {needs.head_dim}"
        return self.why_missing()

    def why_missing(self) -> str | None:
        """Why it is not there at all, and how to get it."""
        if not self.module:
            return None
        reason = why_unusable(self.module, *self.attributes)
        return reason and (f"{reason} ({self.install})" if self.install else reason)


BACKENDS = (
    AttentionBackend(
        "flash-attn-3",
        "flash-attn 3 through torch.nn.attention.varlen",
        module="flash_attn_interface",
        attributes=("flash_attn_varlen_func",),
        install="build it from the hopper folder of the flash-attention repository",
        capabilities=(9, 9),
        dtypes=_SIXTEEN_BITS,
        head_dims=(8, 256),
        head_dim_multiple=8,
        is_flash_attn=True,
    ),
    AttentionBackend(
        "flash-attn-4",
        "flash-attn 4 through torch.nn.attention.varlen",
        module="flash_attn.cute.interface",
        attributes=("_flash_attn_fwd", "_flash_attn_bwd"),
        install="pip install --pre flash-attn-4",
        capabilities=(9, 10),
        dtypes=_SIXTEEN_BITS,
        head_dims=(8, 128),
        head_dim_multiple=8,
        is_flash_attn=True,
    ),
    AttentionBackend(
        "flash-attn-2",
        "flash_attn.flash_attn_varlen_func",
        module="flash_attn",
        attributes=("flash_attn_varlen_func",),
        install="pip install flash-attn --no-build-isolation",
        capabilities=(8, 99),
        dtypes=_SIXTEEN_BITS,
        head_dims=(1, 256),
        is_flash_attn=True,
    ),
    AttentionBackend(
        "torch-varlen",
        "torch.nn.attention.varlen.varlen_attn",
        module="torch.nn.attention.varlen",
        attributes=("varlen_attn",),
        capabilities=(8, 99),
        dtypes=_SIXTEEN_BITS,
        head_dims=(8, 256),
        head_dim_multiple=8,
    ),
    AttentionBackend("sdpa", "SDPA, one call a document length"),
    AttentionBackend(
        "flex",
        "torch.nn.attention.flex_attention with a mask by documents",
        module="triton",
        capabilities=(8, 99),
        dtypes=(*_SIXTEEN_BITS, torch.float32),
        head_dims=(16, 256),
    ),
    AttentionBackend("reference", "the formula, with a mask over the whole row"),
)
BACKEND_BY_NAME = {backend.name: backend for backend in BACKENDS}

_FLASH_IMPLEMENTATIONS = {"flash-attn-3": "FA3", "flash-attn-4": "FA4"}
"""Names under which PyTorch puts these packages in the place of its own flash kernels."""


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def why_not(
    backend: AttentionBackend, needs: AttentionNeeds, *, wanted: str = "auto", use_flash_attn: bool = True
) -> str | None:
    """Why this backend is not taken, whatever the others can do; None when it may be."""
    if wanted not in ("auto", backend.name):
        return f"model.attention_backend is {wanted!r}"
    if backend.is_flash_attn and not use_flash_attn:
        return "model.use_flash_attn is off"
    reason = backend.refusal(needs)
    if reason is None and wanted == "auto" and backend.name == "sdpa" and needs.packed and needs.compiled:
        return "its calls follow the lengths of each batch, for which a compiled block would be compiled anew"
    return reason


@functools.cache
def choose_attention(needs: AttentionNeeds, wanted: str = "auto", use_flash_attn: bool = True) -> str:
    """The name of the backend for these needs.

    Args:
        wanted: the config's `model.attention_backend`.
        use_flash_attn: the config's `model.use_flash_attn`.

    Raises:
        ConfigError: the wanted one is not there or cannot serve.
    """
    if wanted == "auto" and not needs.packed:
        return "sdpa"
    for backend in BACKENDS:
        reason = why_not(backend, needs, wanted=wanted, use_flash_attn=use_flash_attn)
        if reason is None:
            return backend.name
        if wanted == backend.name:
            able = [b.name for b in BACKENDS if why_not(b, needs, use_flash_attn=use_flash_attn) is None]
            raise ConfigError(
                f"model.attention_backend = {wanted!r} cannot be used: {reason}; here the model can use "
                f"{', '.join(able)}, or leave it at 'auto'"
            )
    raise ConfigError(f"model.attention_backend = {wanted!r} is unknown; known are auto, {', '.join(BACKEND_BY_NAME)}")


def reason_of(backend: AttentionBackend, needs: AttentionNeeds, *, wanted: str, use_flash_attn: bool) -> str:
    """Why this backend was chosen: what the user asked for, or what keeps the preferred ones out."""
    if wanted != "auto":
        return f"model.attention_backend is {wanted!r}"
    refused = []
    for other in BACKENDS[: BACKENDS.index(backend)]:
        refused.append(f"{other.name}: {why_not(other, needs, use_flash_attn=use_flash_attn)}")
    return f"the first that serves; {'; '.join(refused)}" if refused else "the first choice"


@constant_when_compiled
def backend_for(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    packed: bool,
    compiled: bool,
    wanted: str,
    use_flash_attn: bool,
) -> str:
    """`choose_attention` for a call on this device. A compiled block has the answer as a constant: it asks while it is
    being compiled, and looks into no package."""
    needs = AttentionNeeds(capability_of(device), dtype, head_dim, packed, compiled)
    return choose_attention(needs, wanted, use_flash_attn)


@functools.cache
def capability_of(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a CUDA device; None when there is no such device to ask."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)


def packed_attention(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    window: int | None,
    scale: float | None,
) -> Tensor:
    """Causal attention inside the documents of a packed row by the backend `name`, any but "sdpa".

    Args:
        q: `[P, H, D]`.
        k, v: `[P, K, D]`; no backend repeats them for the query heads of a group.
        cu_seqlens: int32 `[n + 1]`, from 0 to P.
        max_seqlen: the longest document, on the host.
        window: keys that a query sees at most, itself included.

    Returns:
        `[P, H, D]`.
    """
    if name == "reference":
        return reference.attention(q[None], k[None], v[None], cu_seqlens, window=window, scale=scale)[0]
    if name == "flex":
        from internlm.model.ops.attention.flex_attention import flex_document_attention

        return flex_document_attention(q, k, v, cu_seqlens, window, scale)
    bounds = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    # The kernels count the keys before the query and after it, without itself; (-1, 0) is plain causal.
    window_size = (-1 if window is None else window - 1, 0)
    if name == "flash-attn-2":
        from flash_attn import flash_attn_varlen_func

        result: Tensor = flash_attn_varlen_func(
            q, k, v, *bounds, softmax_scale=scale, causal=True, window_size=window_size
        )
        return result
    # Imported here: it brings the whole compiler along.
    from torch.nn.attention import varlen as torch_varlen

    _use_flash_implementation(_FLASH_IMPLEMENTATIONS.get(name))
    grouped = q.shape[1] != k.shape[1]
    options: dict[str, Any] = {"enable_gqa": True} if grouped and _varlen_has_gqa_flag() else {}
    out = torch_varlen.varlen_attn(q, k, v, *bounds, scale=scale, window_size=window_size, **options)
    assert isinstance(out, Tensor)
    return out


@constant_when_compiled
def _varlen_has_gqa_flag() -> bool:
    """PyTorch 2.12 began to refuse grouped heads without this flag; before, the flag did not exist."""
    from torch.nn.attention import varlen as torch_varlen

    return _has_parameter(torch_varlen.varlen_attn, "enable_gqa")


@functools.cache
def _has_parameter(function: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(function).parameters


@constant_when_compiled
def _use_flash_implementation(name: str | None) -> bool:
    """Let PyTorch's flash attention operators run flash-attn 3 ("FA3"), 4 ("FA4") or its own kernels (None); returns
    whether that changed anything."""
    if torch_attention.current_flash_attention_impl() == name:
        return False
    if name is None:
        torch_attention.restore_flash_attention_impl()
    else:
        torch_attention.activate_flash_attention_impl(name)
    return True
