"""The routed experts of a layer: gated feed-forward networks whose weights are stacked in three dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from internlm.model.initialization import Zeros, set_initializer
from internlm.model.moe.expert_bias import add_expert_bias
from internlm.model.ops.gated_activation import packed_gated_activation
from internlm.model.ops.grouped_linear import grouped_linear

if TYPE_CHECKING:
    from internlm.model.architecture import Architecture


GroupedLinear = Callable[[Tensor, nn.Parameter, Tensor], Tensor]
"""Rows `[M, K]` sorted by expert, weight `[E, N, K]`, int64 `[E]` rows of each expert -> `[M, N]`."""


class Experts(nn.Module):
    """`w2(activation(w1 x) * w3 x)` for each expert on its own rows, with biases if there are any.

    Attributes:
        w13: `[E, 2f, h]`, for each expert the rows of w1 and then those of w3.
        w2: `[E, h, f]`.
        w13_bias, w2_bias: `[E, 2f]` and `[E, h]`, or None.
        bias_share: the part of w2's bias that is added to this rank's results, which are summed over ranks.
        linear13, linear2: `grouped_linear` for w13 and w2, or functions that get full weights from elsewhere, or run
            their GEMMs in float8.
    """

    def __init__(self, architecture: Architecture, num_experts: int, width: int, has_biases: bool = False) -> None:
        super().__init__()
        a = architecture
        self.w13 = nn.Parameter(torch.empty(num_experts, 2 * width, a.hidden_size, dtype=a.dtype))
        self.w2 = nn.Parameter(torch.empty(num_experts, a.hidden_size, width, dtype=a.dtype))
        set_initializer(self.w13, a.init.initializer(a.init.ffn_up))
        # As in `make_linear`: the output is added to the residual stream.
        std = a.init.ffn_other / (math.sqrt(2 * a.num_layers) if a.init.scaled else 1.0)
        set_initializer(self.w2, a.init.initializer(std))
        self.w13_bias: nn.Parameter | None = None
        self.w2_bias: nn.Parameter | None = None
        self.bias_share = 1.0
        if has_biases:
            self.w13_bias = nn.Parameter(torch.empty(num_experts, 2 * width, dtype=a.dtype))
            self.w2_bias = nn.Parameter(torch.empty(num_experts, a.hidden_size, dtype=a.dtype))
            set_initializer(self.w13_bias, Zeros())
            set_initializer(self.w2_bias, Zeros())
        self.linear13: GroupedLinear = grouped_linear
        self.linear2: GroupedLinear = grouped_linear
        self.activation = a.activation
        self.fused_kernels = a.fused_kernels

    def start(self, counts: Tensor) -> Tensor:
        """Called with int64 `[E]`, numbers of rows, before other work; returns what `forward` takes as such."""
        return counts

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Rows of tokens, sorted by expert -> the outputs of their experts.

        Args:
            rows: `[M, h]`.
            counts: int64 `[E]`, number of rows of each expert; their sum is M.

        Returns:
            `[M, h]`.
        """
        gate_up = self.linear13(rows, self.w13, counts)
        if self.w13_bias is not None:
            gate_up = add_expert_bias(gate_up, self.w13_bias, counts)
        hidden = packed_gated_activation(gate_up, self.activation, fused_kernels=self.fused_kernels)
        out = self.linear2(hidden, self.w2, counts)
        return out if self.w2_bias is None else add_expert_bias(out, self.w2_bias * self.bias_share, counts)
