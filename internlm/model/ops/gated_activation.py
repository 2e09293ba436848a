"""Gated activations of the feed-forward network: SwiGLU and GeGLU (https://arxiv.org/abs/2002.05202).

`activation(gate) * up`. The backward pass recomputes the activation instead of saving it: this costs one elementwise
kernel, and saves the memory of one tensor of shape `[tokens, f]` per layer.

The clamped SwiGLU of gpt-oss (https://arxiv.org/abs/2508.10925) is `g sigmoid(1.702 g) (u + 1)`, with the gate g
clamped to at most 7, and u, the output of w3, to [-7, 7].
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from internlm.model.ops import liger_kernels as liger
from internlm.model.ops.implementation_choice import Choice

Activation = Literal["silu", "gelu_tanh", "clamped_silu"]

CLAMP_LIMIT = 7.0
SIGMOID_GAIN = 1.702


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
        activation: "silu" (SwiGLU), "gelu_tanh" (GeGLU with the tanh approximation, as in Gemma) or "clamped_silu"
            (gpt-oss).
        fused_kernels: the config's `model.fused_kernels`.
    """
    if activation == "clamped_silu":
        if torch.compiler.is_compiling():
            return _clamped_silu(gate, up)
        clamped: Tensor = _ClampedSilu.apply(gate, up)
        return clamped
    if torch.compiler.is_compiling():
        # As plain operators: the compiler fuses them with their neighbors, and decides what to recompute.
        return _activate(gate, activation) * up
    if liger.serves(gate, fused_kernels):
        return liger.gated_activation(gate, up, activation)
    result: Tensor = _Gated.apply(gate, up, activation)
    return result


def packed_gated_activation(gate_up: Tensor, activation: Activation, *, fused_kernels: str = "auto") -> Tensor:
    """`gated_activation` of the two halves of the last dimension, whose gradient is one tensor.

    Args:
        gate_up: `[..., 2f]`.
        activation, fused_kernels: see `gated_activation`.

    Returns:
        `[..., f]`.
    """
    if activation == "clamped_silu" or torch.compiler.is_compiling() or liger.serves(gate_up, fused_kernels):
        gate, up = gate_up.chunk(2, dim=-1)
        return gated_activation(gate, up, activation, fused_kernels=fused_kernels)
    result: Tensor = _PackedGated.apply(gate_up, activation)
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


class _PackedGated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.activation = activation
        gate, up = gate_up.chunk(2, dim=-1)
        return _activate(gate, activation).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        out = torch.empty_like(gate_up)
        (gate, up), (grad_gate, grad_up) = gate_up.chunk(2, dim=-1), out.chunk(2, dim=-1)
        # As in `_backward`, but each result is written to its half.
        torch.mul(_activate(gate, ctx.activation), grad, out=grad_up)
        grad_activated = grad * up
        if ctx.activation == "silu":
            torch.ops.aten.silu_backward(grad_activated, gate, grad_input=grad_gate)
        else:
            torch.ops.aten.gelu_backward(grad_activated, gate, approximate="tanh", grad_input=grad_gate)
        return out, None


def _clamped_silu(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.clamp(max=CLAMP_LIMIT), up.clamp(-CLAMP_LIMIT, CLAMP_LIMIT)
    return gate * torch.sigmoid(SIGMOID_GAIN * gate) * (up + 1)


class _ClampedSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _clamped_silu(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        clamped, factor = gate.clamp(max=CLAMP_LIMIT), up.clamp(-CLAMP_LIMIT, CLAMP_LIMIT).add_(1)
        share = torch.sigmoid(SIGMOID_GAIN * clamped)
        slope = share * (1 + SIGMOID_GAIN * clamped * (1 - share))
        grad_gate = (grad * factor * slope).masked_fill_(gate > CLAMP_LIMIT, 0)
        grad_up = (grad * clamped * share).masked_fill_(up.abs() > CLAMP_LIMIT, 0)
        return grad_gate, grad_up
