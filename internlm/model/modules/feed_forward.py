"""The gated feed-forward block of a decoder layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from internlm.model.modules.linear import GroupedLinear, UnpackedLinear, make_linear
from internlm.model.ops.gated_activation import gated_activation
from internlm.model.ops.packed_projections import unpack_gate_up

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
            self.gate_up: UnpackedLinear | GroupedLinear = UnpackedLinear(self, "w13", unpack_gate_up)
        else:
            self.w1 = make_linear(a, a.hidden_size, a.intermediate_size, a.mlp_bias, std)
            self.w3 = make_linear(a, a.hidden_size, a.intermediate_size, a.mlp_bias, std)
            self.gate_up = GroupedLinear(self, "w1", "w3")
        self.w2 = make_linear(a, a.intermediate_size, a.hidden_size, a.mlp_bias, a.init.ffn_other, into_residual=True)
        self.activation = a.activation
        self.fused_kernels = a.fused_kernels

    def forward(self, x: Tensor) -> Tensor:
        """`[B, S, h]` -> `[B, S, h]`."""
        gate, up = self.gate_up(x)
        return self.w2(gated_activation(gate, up, self.activation, fused_kernels=self.fused_kernels))
