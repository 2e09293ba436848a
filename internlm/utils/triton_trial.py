"""A small Triton kernel, to find out whether any runs. Imported only where Triton is installed."""

from __future__ import annotations

import torch
import triton
from triton import language as tl


@triton.jit
def _add_one(values, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(values + index, tl.load(values + index) + 1)


def run_trial(device: torch.device) -> None:
    """Compile and launch the kernel; does not wait for the device."""
    _add_one[(1,)](torch.zeros(32, device=device), BLOCK=32)
