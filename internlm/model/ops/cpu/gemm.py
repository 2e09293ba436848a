"""In which number format this CPU multiplies matrices of 16-bit numbers: in theirs, or widened to fp32.

A CPU without units for a format multiplies it at a fraction of its rate for fp32, and one of Intel's without AMX has
units for bf16 of half that rate. There the factors are widened block by block, multiplied and summed in fp32, and the
result is rounded once. Weights and activations keep their format.

The rule looks at what the CPU is and never at a clock, so that equal machines give equal bits.
"""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from internlm.model.ops.compiling import constant_when_compiled
from internlm.model.ops.implementation_choice import Choice

CpuGemm = Literal["auto", "dtype", "fp32"]
"""The key `model.cpu_gemm`: by the rule, in the factors' own format, or in fp32."""

_FEWEST_ROWS = 32
"""Of a product that is widened: with fewer, as in generation, to read the weights is the work."""

_BLOCK = 1 << 20
"""Numbers of the right factor that are widened at once: 4 MiB, what a cache holds and all products amortise."""

_chosen: CpuGemm = "auto"


@dataclass(frozen=True)
class CpuFeatures:
    """What the rule looks at.

    Attributes:
        machine: as `platform.machine` calls it.
        vendor: as /proc/cpuinfo calls it; "" where there is none.
        flags: as /proc/cpuinfo calls them.
    """

    machine: str
    vendor: str
    flags: frozenset[str]


def rule(features: CpuFeatures, dtype: torch.dtype) -> Choice:
    """How a CPU multiplies matrices of this dtype best: "dtype" or "fp32", and why."""
    if dtype not in (torch.bfloat16, torch.float16):
        return Choice("dtype", "fastest here")
    flags = features.flags
    if features.machine not in ("x86_64", "AMD64") or not flags:
        return Choice("dtype", "nothing is known against them on this CPU")
    if dtype == torch.float16:
        if flags & {"avx512_fp16", "amx_fp16"}:
            return Choice("dtype", "this CPU multiplies fp16 in hardware")
        return Choice("fp32", "this CPU has no units for fp16")
    if "amx_bf16" in flags:
        return Choice("dtype", "this CPU has AMX")
    if "avx512_bf16" not in flags:
        return Choice("fp32", "this CPU has no units for bf16")
    if features.vendor == "GenuineIntel":
        return Choice("fp32", "Intel's AVX512-BF16 without AMX multiplies at half the rate of fp32")
    return Choice("dtype", "this CPU multiplies bf16 in hardware at twice the rate of fp32")


@functools.cache
def this_cpu() -> CpuFeatures:
    """The CPU at hand."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    return features_in(text, platform.machine())


def features_in(cpuinfo: str, machine: str) -> CpuFeatures:
    """The features of the first processor in the text of /proc/cpuinfo."""
    facts: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    return CpuFeatures(machine, facts.get("vendor_id", ""), frozenset(facts.get("flags", "").split()))


def choose_cpu_gemm(products: CpuGemm) -> None:
    """Set how this process multiplies on its CPU, as `model.cpu_gemm` says. Before anything is compiled."""
    global _chosen
    _chosen = products


def choice(dtype: torch.dtype) -> Choice:
    """How this process multiplies matrices of this dtype on its CPU: "dtype" or "fp32", and why."""
    if _chosen == "auto":
        return rule(this_cpu(), dtype)
    if _chosen == "fp32" and dtype not in (torch.bfloat16, torch.float16):
        return Choice("dtype", "they are no narrower than fp32")
    return Choice(_chosen, f"model.cpu_gemm = {_chosen!r}")


@constant_when_compiled
def widens(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of this dtype on this device are computed in fp32."""
    return device.type == "cpu" and choice(dtype).implementation == "fp32"


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a b` for `[M, K]` and `[K, N]`, summed in fp32 or wider and rounded once to their dtype."""
    return _wide_product(a, b, None) if _is_widened(a) else a @ b


def linear_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x weight^T + bias` for `[..., in]` and `[out, in]`, as `product`; not for autograd where it is widened."""
    rows = x.flatten(0, -2)
    if _is_widened(rows):
        return _wide_product(rows, weight.t(), bias).unflatten(0, x.shape[:-1])
    return torch.nn.functional.linear(x, weight, bias)


def _is_widened(a: Tensor) -> bool:
    return widens(a.device, a.dtype) and a.shape[0] >= _FEWEST_ROWS


@torch.library.custom_op(
    "internlm::wide_product", mutates_args=(), schema="(Tensor a, Tensor b, Tensor? bias) -> Tensor"
)
def _wide_product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """`a b + bias`: `[M, K]`, `[K, N]` and `[N]` -> `[M, N]`."""
    out = a.new_empty(a.shape[0], b.shape[1])
    wide = a.float()
    step = max(64, _BLOCK // max(1, b.shape[0]))
    for start in range(0, b.shape[1], step):
        columns = slice(start, start + step)
        block = b[:, columns].float()
        out[:, columns] = wide @ block if bias is None else torch.addmm(bias[columns].float(), wide, block)
    return out


@_wide_product.register_fake
def _(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])
