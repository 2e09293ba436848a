"""Linear layers of experts in float8, or whose weights are split over ranks and gathered for each grouped GEMM.

With all experts of a layer on each rank (an expert degree of 1), gathered weights leave tokens where they are: shapes
are static and no rank waits for the number of rows of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from internlm.core.parallel.linear.weight_gradients import WeightGradients
from internlm.core.parallel.parameter_events import deliver_gradient
from internlm.model.moe.experts import Experts
from internlm.model.ops.grouped_kernels import GroupedKernels
from internlm.model.ops.linear_kernels import Operand
from internlm.model.recompute import as_gemm_operator, as_recomputed_operator
from internlm.model.roles import Role


class ExpertWeightStore(Protocol):
    """Where the full weights of experts come from, and where their gradients go; see `WeightStore`."""

    def acquire(self, group: Any, parameters: Sequence[nn.Parameter], *, backward: bool) -> Sequence[Operand]:
        """The full weights."""

    def release(self, group: Any) -> None:
        """The full weights are no longer needed."""

    def deliver(self, parameter: nn.Parameter, gradient: Tensor) -> Tensor | None:
        """Take the gradient of a full weight; a returned tensor is for autograd to accumulate at once."""


class ExpertLinear:
    """One linear layer of the experts of a layer. Takes the place of `grouped_linear` in `Experts`.

    Args:
        name: of the experts' module.
        experts: the module, which holds the parameter.
        attribute: name of the parameter, "w13" or "w2".
        weights: the source of full weights.
        weight_gradients: queue of weight gradients that are computed later.
        kernels: of the GEMMs.
    """

    def __init__(
        self,
        name: str,
        experts: Experts,
        attribute: str,
        weights: ExpertWeightStore,
        weight_gradients: WeightGradients,
        kernels: GroupedKernels,
    ) -> None:
        self.name = f"{name}.{attribute}"
        self.role = Role.EXPERTS
        self.kernels = kernels
        # Not the parameter, which FSDP replaces.
        self._experts, self._attribute = experts, attribute
        self.weights = weights
        self.weight_gradients = weight_gradients

    def parameters(self) -> list[nn.Parameter]:
        """The local parameter, as a group of weights that are gathered together."""
        return [getattr(self._experts, self._attribute)]

    def __call__(self, rows: Tensor, parameter: nn.Parameter, counts: Tensor) -> Tensor:
        """Rows `[M, K]` sorted by expert, this rank's part of `[E, N, K]`, int64 `[E]` -> `[M, N]`. Collective."""
        out: Tensor = _ExpertLinearFunction.apply(self, rows, counts, parameter)
        return out

    def deliver_later(
        self, parameter: nn.Parameter, grad: Tensor, saved: Tensor, counts: Tensor, *scales: Tensor
    ) -> None:
        """Compute and deliver the gradient of a weight, outside of autograd."""
        gradient = self.weight_gradient(parameter, grad, saved, counts, scales)
        if gradient is not None:
            deliver_gradient(parameter, gradient)

    def weight_gradient(
        self, parameter: nn.Parameter, grad: Tensor, saved: Tensor, counts: Tensor, scales: Sequence[Tensor]
    ) -> Tensor | None:
        """Compute the gradient of a weight; a returned tensor is for autograd to accumulate."""
        return self.weights.deliver(parameter, self.kernels.weight_gradient(grad, saved, counts, list(scales)))


class _ExpertLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, linear: ExpertLinear, rows: Tensor, counts: Tensor, parameter: nn.Parameter) -> Tensor:
        kernels, saved = linear.kernels, list[Tensor]()

        def run_gemm() -> list[Tensor]:
            (weight,) = linear.weights.acquire(linear, [parameter], backward=False)
            scales = kernels.compute_scales(rows, weight)
            saved.append(kernels.saved_rows(rows, scales))
            out = kernels.output(saved[0], weight, counts, scales)
            linear.weights.release(linear)
            return [out, *scales]

        out, *scales = as_gemm_operator(run_gemm, rows)
        kept = rows
        if kernels.is_float8:

            def quantized() -> list[Tensor]:
                # Recomputation that has the output at hand ran no GEMM: it only quantizes the rows again.
                return saved or [kernels.saved_rows(rows, scales)]

            (kept,) = as_recomputed_operator(quantized, rows)
        # The parameter is a leaf: kept as it is, as in parallel linear layers.
        ctx.linear, ctx.parameter = linear, parameter
        ctx.save_for_backward(kept, counts, *scales)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, None, Tensor | None]:
        linear: ExpertLinear = ctx.linear
        parameter: nn.Parameter = ctx.parameter
        saved, counts, *scales = ctx.saved_tensors
        grad_rows = grad_weight = None
        if ctx.needs_input_grad[1]:
            (weight,) = linear.weights.acquire(linear, [parameter], backward=True)
            grad_rows = linear.kernels.input_gradient(grad, weight, counts, scales)
            linear.weights.release(linear)
        if parameter.requires_grad:
            if linear.weight_gradients.is_postponing:
                linear.weight_gradients.compute(partial(linear.deliver_later, parameter, grad, saved, counts, *scales))
            else:
                grad_weight = linear.weight_gradient(parameter, grad, saved, counts, scales)
        return None, grad_rows, None, grad_weight
