"""The number format of GEMMs of 16-bit matrices on a CPU: their own, or fp32.

On a CPU without units for a format, GEMMs in it are several times slower than in fp32; the bf16 units of Intel CPUs
without AMX reach half the rate of fp32. On these CPUs, operands are converted to fp32 block by block, products are
summed in fp32, and the result is rounded once. Weights and activations keep their dtype.

The rule depends on CPU features, never on a timing, so that equal machines give equal bits.
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
"""Values of `model.cpu_gemm`: by the rule, in the dtype of the operands, or in fp32."""

_MIN_ROWS = 32
"""Smallest number of rows for fp32: with fewer, as in generation, a GEMM is bound by reading the weights."""

_BLOCK = 1 << 20
"""Elements of the right operand that are converted at once: 4 MiB in fp32, which fits into a cache."""

_chosen: CpuGemm = "auto"


@dataclass(frozen=True)
class CpuFeatures:
    """The inputs of the rule.

    Attributes:
        machine: result of `platform.machine`.
        vendor: vendor_id in /proc/cpuinfo; "" without one.
        flags: flags in /proc/cpuinfo.
    """

    machine: str
    vendor: str
    flags: frozenset[str]


def rule(features: CpuFeatures, dtype: torch.dtype) -> Choice:
    """The faster number format of GEMMs of this dtype on a CPU: "dtype" or "fp32", and why."""
    if dtype not in (torch.bfloat16, torch.float16):
        return Choice("dtype", "the dtype is not a 16-bit one")
    flags = features.flags
    if features.machine not in ("x86_64", "AMD64") or not flags:
        return Choice("dtype", "no reason for fp32 is known on this CPU")
    if dtype == torch.float16:
        if flags & {"avx512_fp16", "amx_fp16"}:
            return Choice("dtype", "this CPU has fp16 units")
        return Choice("fp32", "this CPU has no fp16 units")
    if "amx_bf16" in flags:
        return Choice("dtype", "this CPU has AMX")
    if "avx512_bf16" not in flags:
        return Choice("fp32", "this CPU has no bf16 units")
    if features.vendor == "GenuineIntel":
        return Choice("fp32", "Intel's AVX512-BF16 without AMX has half the rate of fp32")
    return Choice("dtype", "the bf16 units of this CPU have twice the rate of fp32")


@functools.cache
def this_cpu() -> CpuFeatures:
    """The features of this machine's CPU."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    return features_in(text, platform.machine())


def features_in(cpuinfo: str, machine: str) -> CpuFeatures:
    """The features of the first processor in the text of /proc/cpuinfo."""
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return CpuFeatures(machine, fields.get("vendor_id", ""), frozenset(fields.get("flags", "").split()))


def choose_cpu_gemm(value: CpuGemm) -> None:
    """Set `model.cpu_gemm` for this process. Must be called before any layer is compiled."""
    global _chosen
    _chosen = value


def choice(dtype: torch.dtype) -> Choice:
    """The number format of GEMMs of this dtype in this process: "dtype" or "fp32", and why."""
    if _chosen == "auto":
        return rule(this_cpu(), dtype)
    if _chosen == "fp32" and dtype not in (torch.bfloat16, torch.float16):
        return Choice("dtype", "the dtype is not a 16-bit one")
    return Choice(_chosen, f"model.cpu_gemm = {_chosen!r}")


@constant_when_compiled
def widens(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether GEMMs of this dtype on this device are computed in fp32."""
    return device.type == "cpu" and choice(dtype).implementation == "fp32"


def gemm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """`a b` for `[M, K]` and `[K, N]`, summed in fp32 or float64 and rounded once to their dtype.

    Args:
        a, b: the operands.
        out: `[M, N]`, receives the result; None: a new tensor.
    """
    if _is_widened(a):
        result: Tensor = _fp32_gemm(a, b, None)
        return result if out is None else out.copy_(result)
    return a @ b if out is None else torch.mm(a, b, out=out)


def linear_gemm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x weight^T + bias` for `[..., in]` and `[out, in]`, as by `gemm`. In fp32, it is not differentiable."""
    rows = x.flatten(0, -2)
    if _is_widened(rows):
        return _fp32_gemm(rows, weight.t(), bias).unflatten(0, x.shape[:-1])
    return torch.nn.functional.linear(x, weight, bias)


def _is_widened(a: Tensor) -> bool:
    return widens(a.device, a.dtype) and a.shape[0] >= _MIN_ROWS


@torch.library.custom_op("internlm::fp32_gemm", mutates_args=(), schema="(Tensor a, Tensor b, Tensor? bias) -> Tensor")
def _fp32_gemm(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """`a b + bias` computed in fp32: `[M, K]`, `[K, N]` and `[N]` -> `[M, N]` in their dtype."""
    out = a.new_empty(a.shape[0], b.shape[1])
    wide = a.float()
    step = max(64, _BLOCK // max(1, b.shape[0]))
    for start in range(0, b.shape[1], step):
        columns = slice(start, start + step)
        block = b[:, columns].float()
        out[:, columns] = wide @ block if bias is None else torch.addmm(bias[columns].float(), wide, block)
    return out


@_fp32_gemm.register_fake
def _(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])
