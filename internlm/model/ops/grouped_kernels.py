"""GEMMs of the linear layers of experts: in the dtype of their operands, or in float8.

Those in float8 are in `internlm.model.ops.float8.grouped_kernels`.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from internlm.model.ops.grouped_linear import grouped_linear, input_gradient, weight_gradient
from internlm.model.ops.linear_kernels import Operand


class GroupedKernels:
    """GEMMs in the dtype of the operands; shapes and counts as in `internlm.model.ops.grouped_linear`."""

    is_float8: ClassVar[bool] = False
    """Whether a weight may also be a `Scaled`."""

    def compute_scales(self, rows: Tensor, weight: Operand) -> list[Tensor]:
        """Scales of the rows `[M]` and of the weight of each expert `[E]`; none without float8."""
        return []

    def saved_rows(self, rows: Tensor, scales: list[Tensor]) -> Tensor:
        """The rows as the GEMMs read them, to save for backward."""
        return rows

    def output(self, saved: Tensor, weight: Operand, counts: Tensor, scales: list[Tensor]) -> Tensor:
        """The output, `[M, N]`."""
        assert isinstance(weight, Tensor)
        return grouped_linear(saved, weight, counts)

    def input_gradient(self, grad: Tensor, weight: Operand, counts: Tensor, scales: list[Tensor]) -> Tensor:
        """The gradient of the rows, `[M, K]`."""
        assert isinstance(weight, Tensor)
        return input_gradient(grad, weight, counts)

    def weight_gradient(self, grad: Tensor, saved: Tensor, counts: Tensor, scales: list[Tensor]) -> Tensor:
        """The gradient of the weight, `[E, N, K]`."""
        return weight_gradient(grad, saved, counts)
