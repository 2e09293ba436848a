"""C++ ops for CPUs with bf16 units: AMX, the matrix units of Intel's servers, or AVX512-BF16.

They are compiled for the current machine at first use, which takes a minute, and are registered in
`torch.ops.internlm_native`. They are optional: without them, slower PyTorch operators are used.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from internlm.model.ops.compiling import constant_when_compiled
from internlm.utils.cpp_extension import CompileError, compile_library
from internlm.utils.logging import get_logger

_SOURCES = Path(__file__).with_name("native_ops")
_FLAGS = tuple(f"-m{name}" for name in ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512bf16", "fma"))

_log = get_logger(__name__)


@constant_when_compiled
def has_bf16_units() -> bool:
    """Whether this CPU has units for bf16: AVX512-BF16, or AMX, which implies it."""
    return _has("_is_avx512_bf16_supported")


@constant_when_compiled
def has_matrix_units() -> bool:
    """Whether this CPU has AMX."""
    return has_bf16_units() and _has("_is_amx_tile_supported")


def _has(query: str) -> bool:
    # A private function of PyTorch; if a version lacks it, the feature counts as missing.
    supported = getattr(torch.cpu, query, None)
    return supported is not None and bool(supported())


@constant_when_compiled
def has_native_ops() -> bool:
    """Whether `torch.ops.internlm_native` is available; the first call may compile it."""
    return why_no_native_ops() is None


@functools.cache
def why_no_native_ops() -> str | None:
    """Why `torch.ops.internlm_native` is not available; None if it is."""
    if not has_bf16_units():
        return "this CPU has no bf16 units"
    try:
        torch.ops.load_library(str(compile_library(_SOURCES, _FLAGS)))
    except (CompileError, OSError) as error:
        reason = str(error)
    else:
        # May run again after the cache was cleared; PyTorch 2.11 refuses a second registration without the flag.
        torch.library.register_fake("internlm_native::transposed", _fake_transposed, allow_override=True)
        return None
    _log.warning("bf16 and generation are slower than possible on this CPU: %s", reason)
    return reason


def _fake_transposed(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], x.shape[0])
