"""RMSNorm over all heads of a query or key projection together (OLMoE, https://arxiv.org/abs/2409.02060)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from internlm.model.initialization import Ones, set_initializer
from internlm.model.ops.norm import rms_norm


class ProjectionNorm(nn.Module):
    """RMSNorm over the channels of all heads; the result has the dtype of its input.

    A rank that holds some of the heads runs the same code with `sum_over_heads` set: the mean square of a token is that
    of all heads.

    Args:
        num_channels: of all heads.
        eps: added to the mean square.
        dtype: of the weight.
        fused_kernels: see `model.fused_kernels`.

    Attributes:
        weight: `[heads * D]`, of the heads of this rank.
        sum_over_heads: sum of squares over this rank's heads, `[B, S, 1]` -> that over all heads; None: this rank holds
            all heads. Its backward pass sums the gradients of all ranks, as each normalizes its own heads.
    """

    def __init__(self, num_channels: int, eps: float, dtype: torch.dtype, *, fused_kernels: str = "auto") -> None:
        super().__init__()
        self.num_channels = num_channels
        self.eps = eps
        self.fused_kernels = fused_kernels
        self.weight = nn.Parameter(torch.empty(num_channels, dtype=dtype))
        set_initializer(self.weight, Ones())
        self.sum_over_heads: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """`[B, S, heads, D]` -> `[B, S, heads, D]`."""
        channels = x.flatten(2)
        if self.sum_over_heads is None:
            out = rms_norm(channels, self.weight, self.eps, fused_kernels=self.fused_kernels)
            return out.view(x.shape)
        dtype = torch.promote_types(torch.promote_types(x.dtype, self.weight.dtype), torch.float32)
        wide = channels.to(dtype)
        squares = self.sum_over_heads(wide.square().sum(-1, keepdim=True))
        out = wide * torch.rsqrt(squares / self.num_channels + self.eps) * self.weight.to(dtype)
        return out.to(x.dtype).view(x.shape)
