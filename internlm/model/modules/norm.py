"""Normalization layers: modules that hold the weight and call the op."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from internlm.model.initialization import Ones, Zeros, set_initializer
from internlm.model.ops.norm import layer_norm, rms_norm
from internlm.utils.former_names import explain_former_names

explain_former_names(__name__)


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension; the result has the dtype of its input.

    Args:
        dim: size of the last dimension.
        eps: added to the mean square.
        dtype: of the weight.
        unit_offset: scale by 1 + weight, and initialize the weight to 0 (Gemma).
        fused_kernels: see `model.fused_kernels`.
    """

    def __init__(
        self, dim: int, eps: float, dtype: torch.dtype, *, unit_offset: bool = False, fused_kernels: str = "auto"
    ) -> None:
        super().__init__()
        self.eps = eps
        self.unit_offset = unit_offset
        self.fused_kernels = fused_kernels
        self.weight = nn.Parameter(torch.empty(dim, dtype=dtype))
        set_initializer(self.weight, Zeros() if unit_offset else Ones())

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, unit_offset=self.unit_offset, fused_kernels=self.fused_kernels)


class LayerNorm(nn.Module):
    """LayerNorm with bias over the last dimension, of size `dim`; the result has the dtype of its input."""

    def __init__(self, dim: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(dim, dtype=dtype))
        set_initializer(self.weight, Ones())
        set_initializer(self.bias, Zeros())

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)
