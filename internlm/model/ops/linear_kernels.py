"""GEMMs of linear layers that share an input: in the dtype of their operands, or in float8.

An operand of a GEMM is a tensor, or one in float8 (`Scaled`). The GEMMs in float8 are in
`internlm.model.ops.float8.kernels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from internlm.model.ops.cpu.gemm import linear_gemm
from internlm.model.ops.float8.scaled_gemm import Scaled
from internlm.model.ops.linear import input_gradient, weight_gradient

Operand = Tensor | Scaled


class LinearKernels:
    """GEMMs in the dtype of the operands. Shapes: input `[..., in]`, weight `[out, in]`, gradient `[..., out]`."""

    is_float8: ClassVar[bool] = False
    """Whether a weight may also be a `Scaled`."""

    def compute_scales(self, x: Tensor, weights: Sequence[Sequence[Operand]]) -> Tensor | None:
        """Scales of the input, then of each layer's weight (a list of its shards); None without float8."""
        return None

    def quantize_input(self, x: Tensor, scales: Tensor | None) -> Operand:
        """The input as an operand."""
        return x

    def saved_input(self, x: Operand) -> Tensor:
        """The tensor of an input operand to save for backward."""
        assert isinstance(x, Tensor)
        return x

    def restore_input(self, saved: Tensor, scales: Tensor | None) -> Operand:
        """The input operand, from the saved tensor."""
        return saved

    def quantize_weight(self, weight: Operand, scales: Tensor | None, layer: int) -> Operand:
        """A weight of layer `layer`, or a shard of it, as an operand."""
        return weight

    def quantize_gradients(self, grads: Sequence[Sequence[Tensor]]) -> list[list[Operand]]:
        """Gradients of each layer's outputs as operands."""
        return [list(own) for own in grads]

    def output(self, x: Operand, weight: Operand, bias: Tensor | None) -> Tensor:
        """The output, `[..., out]`."""
        assert isinstance(x, Tensor) and isinstance(weight, Tensor)
        return linear_gemm(x, weight, bias)

    def input_gradient(self, grad: Operand, weight: Operand) -> Tensor:
        """The gradient of the input, `[..., in]`."""
        assert isinstance(grad, Tensor) and isinstance(weight, Tensor)
        return input_gradient(grad, weight)

    def weight_gradient(self, grad: Operand, x: Operand) -> Tensor:
        """The gradient of the weight, `[out, in]`."""
        assert isinstance(grad, Tensor) and isinstance(x, Tensor)
        return weight_gradient(grad, x)
