"""Liger's Triton kernels (https://arxiv.org/abs/2410.10989) for the ops between GEMMs in uncompiled blocks.

Used are kernels with the same numerics as ours: RMSNorm in "gemma" mode, which computes in fp32 and rounds once (the
default mode rounds before it multiplies by the weight), and the gated activations. Not used are rotary embedding, which
supports only the half-split layout and overwrites its input; fused cross entropy, which does not support a vocabulary
split over ranks; and LayerNorm, which is fused in PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from internlm.model.ops.implementation_choice import Choice
from internlm.utils.errors import ConfigError
from internlm.utils.optional_packages import why_unusable

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def why_not(device: torch.device, fused_kernels: str, *, compiled: bool = False) -> str | None:
    """Why Liger's kernels are not used on this device; None if they are.

    Args:
        device: of the run.
        fused_kernels: the config's `model.fused_kernels`.
        compiled: the op runs inside a compiled block.

    Raises:
        ConfigError: the config requires them, and they cannot be used.
    """
    if fused_kernels == "none":
        return "model.fused_kernels is 'none'"
    if device.type != "cuda":
        # Not an error: a config for GPUs also runs on CPUs.
        return f"Liger's kernels need a GPU, this is {device.type}"
    if compiled:
        return "the block is compiled, which fuses it"
    reason = why_unusable("liger_kernel.ops", "LigerRMSNormFunction", "LigerSiLUMulFunction", "LigerGELUMulFunction")
    if reason is None:
        return None
    if fused_kernels == "liger":
        raise ConfigError(
            f"model.fused_kernels = 'liger' cannot be used: {reason}; pip install liger-kernel, or leave it at 'auto'"
        )
    return reason


def choice(device: torch.device, fused_kernels: str, *, compiled: bool, name: str, otherwise: Choice) -> Choice:
    """Liger's function `name` if it is used; else `otherwise`."""
    reason = why_not(device, fused_kernels, compiled=compiled)
    if reason is None:
        return Choice(f"liger_kernel.ops.{name}", "liger-kernel is installed and the block is not compiled")
    if device.type != "cuda":
        return otherwise
    return Choice(otherwise.implementation, f"{otherwise.reason}; {reason}")


def serves(x: Tensor, fused_kernels: str) -> bool:
    """Whether Liger's kernels are used for this tensor."""
    if not x.is_cuda or torch.compiler.is_compiling() or x.dtype not in _DTYPES or not x.numel():
        return False
    return why_not(x.device, fused_kernels) is None


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, unit_offset: bool) -> Tensor:
    """As `norm.rms_norm`."""
    from liger_kernel.ops import LigerRMSNormFunction

    # Not in place: the output gradient, which it would overwrite, may also be that of the residual stream.
    result: Tensor = LigerRMSNormFunction.apply(x, weight, eps, 1.0 if unit_offset else 0.0, "gemma", False)
    return result


def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """As `gated.gated_activation`. Backward overwrites `gate` and `up` with their gradients, so it runs only once."""
    from liger_kernel.ops import LigerGELUMulFunction, LigerSiLUMulFunction

    function: Any = LigerSiLUMulFunction if activation == "silu" else LigerGELUMulFunction
    result: Tensor = function.apply(gate, up)
    return result
