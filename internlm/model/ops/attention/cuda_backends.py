"""Attention kernels for CUDA as data: what each supports, whether it is installed, and the order of preference.

The choice depends on the model's requirements (`AttentionNeeds`) and on the machine, never on a batch, so it is made
once for each configuration of a process. The order of `BACKENDS` is the preference for packed and windowed rows:

1. flash-attn 3, written for Hopper; flash-attn 4, for Blackwell; flash-attn 2, newer than its copy in PyTorch;
2. PyTorch's varlen attention, which is that copy: nothing to install;
3. SDPA, one call per document length, where those kernels are not supported (fp32, old GPUs, odd head dimensions). Its
   calls depend on the lengths of a batch, so compiled blocks use the next one instead;
4. flex attention, a Triton kernel for any dtype;
5. the reference, with a mask over the whole row.

Rows of equal length without a window use SDPA, which includes cuDNN's kernel, the fastest for them on Hopper and later.
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
    """Requirements of a model on attention on a CUDA device.

    Attributes:
        capability: compute capability of the GPU; None without a GPU.
        dtype: of queries, keys and values.
        head_dim: D.
        packed: rows hold several documents or have a window, so SDPA's causal mask does not suffice.
        compiled: attention runs inside a compiled block.
    """

    capability: tuple[int, int] | None
    dtype: torch.dtype
    head_dim: int
    packed: bool = True
    compiled: bool = False


@dataclass(frozen=True)
class AttentionBackend:
    """An attention kernel and its limits.

    Attributes:
        name: its value in `model.attention_backend`.
        implementation: description for the log.
        module, attributes: what must be importable; an empty module needs no import.
        install: how to install it; empty: part of PyTorch.
        capabilities: the smallest and largest supported major compute capability.
        dtypes: supported dtypes; None: all.
        head_dims: the smallest and largest supported head dimension.
        head_dim_multiple: supported head dimensions are multiples of this.
        is_flash_attn: whether `model.use_flash_attn = False` excludes it.
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
        """Why it cannot be used for these needs on this machine; None if it can."""
        if needs.capability is not None and not self.capabilities[0] <= needs.capability[0] <= self.capabilities[1]:
            first, last = self.capabilities
            required = (
                f"{first}.x" if first == last else f"{first}.x to {last}.x" if last < 99 else f"{first}.0 or later"
            )
            return f"needs compute capability {required}, this GPU has {needs.capability[0]}.{needs.capability[1]}"
        if self.dtypes is not None and needs.dtype not in self.dtypes:
            return f"does not support {_short(needs.dtype)} (only {', '.join(map(_short, self.dtypes))})"
        if not self.head_dims[0] <= needs.head_dim <= self.head_dims[1] or needs.head_dim % self.head_dim_multiple:
            step = f", multiples of {self.head_dim_multiple}" if self.head_dim_multiple > 1 else ""
            bounds = (
                f"{self.head_dims[0]} to {self.head_dims[1]}"
                if self.head_dims[1] < 1 << 30
                else (f"{self.head_dims[0]} or more")
            )
            return f"supports head dimensions {bounds}{step}, the model has {needs.head_dim}"
        return self.why_missing()

    def why_missing(self) -> str | None:
        """Why it cannot be imported, and how to install it; None if it can."""
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
    AttentionBackend("sdpa", "SDPA, one call per document length"),
    AttentionBackend(
        "flex",
        "torch.nn.attention.flex_attention with a document mask",
        module="triton",
        capabilities=(8, 99),
        dtypes=(*_SIXTEEN_BITS, torch.float32),
        head_dims=(16, 256),
    ),
    AttentionBackend("reference", "reference implementation, with a mask over the whole row"),
)
BACKEND_BY_NAME = {backend.name: backend for backend in BACKENDS}

_FLASH_IMPLEMENTATIONS = {"flash-attn-3": "FA3", "flash-attn-4": "FA4"}
"""Names under which PyTorch replaces its own flash kernels by these packages."""


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def why_not(
    backend: AttentionBackend, needs: AttentionNeeds, *, wanted: str = "auto", use_flash_attn: bool = True
) -> str | None:
    """Why this backend is excluded, regardless of the others; None if it is not.

    Args:
        backend: one of `BACKENDS`.
        needs: see `AttentionNeeds`.
        wanted: the config's `model.attention_backend`.
        use_flash_attn: the config's `model.use_flash_attn`.
    """
    if wanted not in ("auto", backend.name):
        return f"model.attention_backend is {wanted!r}"
    if backend.is_flash_attn and not use_flash_attn:
        return "model.use_flash_attn is off"
    reason = backend.refusal(needs)
    if reason is None and wanted == "auto" and backend.name == "sdpa" and needs.packed and needs.compiled:
        return "its calls depend on the lengths of each batch, so a compiled block would be recompiled"
    return reason


@functools.cache
def choose_attention(needs: AttentionNeeds, wanted: str = "auto", use_flash_attn: bool = True) -> str:
    """The name of the backend for these needs.

    Args:
        needs: see `AttentionNeeds`.
        wanted: the config's `model.attention_backend`.
        use_flash_attn: the config's `model.use_flash_attn`.

    Raises:
        ConfigError: the configured backend does not exist, is not installed, or does not support the needs.
    """
    if wanted == "auto" and not needs.packed:
        return "sdpa"
    for backend in BACKENDS:
        reason = why_not(backend, needs, wanted=wanted, use_flash_attn=use_flash_attn)
        if reason is None:
            return backend.name
        if wanted == backend.name:
            usable = [b.name for b in BACKENDS if why_not(b, needs, use_flash_attn=use_flash_attn) is None]
            raise ConfigError(
                f"model.attention_backend = {wanted!r} cannot be used: {reason}; use one of "
                f"{', '.join(usable)}, or leave it at 'auto'"
            )
    raise ConfigError(f"model.attention_backend = {wanted!r} is unknown; use auto, {', '.join(BACKEND_BY_NAME)}")


def reason_of(backend: AttentionBackend, needs: AttentionNeeds, *, wanted: str, use_flash_attn: bool) -> str:
    """Why this backend was chosen: it was configured, or the preferred ones are excluded."""
    if wanted != "auto":
        return f"model.attention_backend is {wanted!r}"
    excluded = []
    for other in BACKENDS[: BACKENDS.index(backend)]:
        excluded.append(f"{other.name}: {why_not(other, needs, use_flash_attn=use_flash_attn)}")
    return f"the first usable one; {'; '.join(excluded)}" if excluded else "the first choice"


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
    """`choose_attention` for a call on this device. In a compiled block the result is a constant."""
    needs = AttentionNeeds(capability_of(device), dtype, head_dim, packed, compiled)
    return choose_attention(needs, wanted, use_flash_attn)


@functools.cache
def capability_of(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a CUDA device; None for any other device, or without a GPU."""
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
    """Causal attention within the documents of a packed row.

    Args:
        name: of a backend other than "sdpa".
        q: `[P, H, D]`.
        k, v: `[P, K, D]`; no backend materializes copies of them for the query heads of a group.
        cu_seqlens: int32 `[n + 1]`, from 0 to P.
        max_seqlen: length of the longest document, or more.
        window: maximum number of keys that a query attends to, itself included; None: no limit.
        scale: factor on the scores; None: 1 / sqrt(D).

    Returns:
        `[P, H, D]`.
    """
    if name == "reference":
        return reference.attention(q[None], k[None], v[None], cu_seqlens, window=window, scale=scale)[0]
    if name == "flex":
        from internlm.model.ops.attention.flex_attention import flex_document_attention

        return flex_document_attention(q, k, v, cu_seqlens, window, scale)
    bounds = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    # (keys before the query, keys after it), without the query itself; -1: no limit.
    window_size = (-1 if window is None else window - 1, 0)
    if name == "flash-attn-2":
        from flash_attn import flash_attn_varlen_func

        result: Tensor = flash_attn_varlen_func(
            q, k, v, *bounds, softmax_scale=scale, causal=True, window_size=window_size
        )
        return result
    # Imported here because it imports the compiler.
    from torch.nn.attention import varlen as torch_varlen

    use_flash_implementation(_FLASH_IMPLEMENTATIONS.get(name))
    grouped = q.shape[1] != k.shape[1]
    options: dict[str, Any] = {"enable_gqa": True} if grouped and _varlen_has_gqa_flag() else {}
    out = torch_varlen.varlen_attn(q, k, v, *bounds, scale=scale, window_size=window_size, **options)
    assert isinstance(out, Tensor)
    return out


@constant_when_compiled
def _varlen_has_gqa_flag() -> bool:
    """Whether grouped heads need a flag: PyTorch 2.12 introduced it, and refuses them without."""
    from torch.nn.attention import varlen as torch_varlen

    return _has_parameter(torch_varlen.varlen_attn, "enable_gqa")


@functools.cache
def _has_parameter(function: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(function).parameters


@constant_when_compiled
def use_flash_implementation(name: str | None) -> bool:
    """Make PyTorch's flash attention operators run flash-attn 3 ("FA3"), 4 ("FA4") or PyTorch's own kernels (None).

    Returns whether that changed anything.
    """
    if torch_attention.current_flash_attention_impl() == name:
        return False
    if name is None:
        torch_attention.restore_flash_attention_impl()
    else:
        torch_attention.activate_flash_attention_impl(name)
    return True
