"""Gated activations of the feed-forward network: SwiGLU and GeGLU (https://arxiv.org/abs/2002.05202).

`activation(gate) * up`. The backward pass recomputes the activation instead of saving it: this costs one elementwise
kernel, and saves the memory of one tensor of shape `[tokens, f]` per layer.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from internlm.model.ops import liger_kernels as liger
from internlm.model.ops.implementation_choice import Choice

Activation = Literal["silu", "gelu_tanh"]


def choice(device: torch.device, fused_kernels: str = "auto", *, compiled: bool = False) -> Choice:
    """The implementation of `gated_activation`."""
    own = Choice("own autograd function", "recomputes the activation in backward, on every device")
    name = "LigerSiLUMulFunction, LigerGELUMulFunction"
    return liger.choice(device, fused_kernels, compiled=compiled, name=name, otherwise=own)


def gated_activation(gate: Tensor, up: Tensor, activation: Activation, *, fused_kernels: str = "auto") -> Tensor:
    """`activation(gate) * up`, elementwise.

    Args:
        gate: `[..., f]`, the output of w1.
        up: `[..., f]`, the output of w3.
        activation: "silu" (SwiGLU) or "gelu_tanh" (GeGLU with the tanh approximation, as in Gemma).
        fused_kernels: the config's `model.fused_kernels`.
    """
    if torch.compiler.is_compiling():
        # As plain operators: the compiler fuses them with their neighbors, and decides what to recompute.
        return _activate(gate, activation) * up
    if liger.serves(gate, fused_kernels):
        return liger.gated_activation(gate, up, activation)
    result: Tensor = _Gated.apply(gate, up, activation)
    return result


def _activate(gate: Tensor, activation: Activation) -> Tensor:
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")


def _backward(grad: Tensor, gate: Tensor, up: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    grad_up = _activate(gate, activation).mul_(grad)
    grad_activated = grad * up
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad_activated, gate), grad_up
    return torch.ops.aten.gelu_backward(grad_activated, gate, approximate="tanh"), grad_up


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _activate(gate, activation).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        return *_backward(grad, gate, up, ctx.activation), None
