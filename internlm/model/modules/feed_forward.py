"""The gated feed-forward block of a decoder layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from internlm.model.modules.linear import GroupedLinear, make_linear
from internlm.model.ops.gated_activation import fused_gated_activation, gated_activation

if TYPE_CHECKING:
    from internlm.model.architecture import Architecture


class FeedForward(nn.Module):
    """`w2(activation(w1 x) * w3 x)`; fused, `w13` holds the rows of w1 and then those of w3."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        a = architecture
        std = a.init.ffn_up
        if a.fused_gate_up:
            self.w13 = make_linear(a, a.hidden_size, 2 * a.intermediate_size, a.mlp_bias, std)
            self.gate_up = GroupedLinear(self, "w13")
        else:
            self.w1 = make_linear(a, a.hidden_size, a.intermediate_size, a.mlp_bias, std)
            self.w3 = make_linear(a, a.hidden_size, a.intermediate_size, a.mlp_bias, std)
            self.gate_up = GroupedLinear(self, "w1", "w3")
        self.w2 = make_linear(a, a.intermediate_size, a.hidden_size, a.mlp_bias, a.init.ffn_other, into_residual=True)
        self.fused = a.fused_gate_up
        self.activation = a.activation
        self.fused_kernels = a.fused_kernels

    def forward(self, x: Tensor) -> Tensor:
        """`[B, S, h]` -> `[B, S, h]`."""
        projected = self.gate_up(x)
        if self.fused:
            # Not two views: the fused function writes one gradient for both halves.
            return self.w2(fused_gated_activation(projected[0], self.activation))
        gate, up = projected
        return self.w2(gated_activation(gate, up, self.activation, fused_kernels=self.fused_kernels))
