"""Experts whose weights are split over ranks: gathered for each grouped GEMM, so that tokens stay where they are.

With all experts of a layer on each rank (an expert degree of 1), shapes are static and no rank waits for the number of
rows of another.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from internlm.core.parallel.linear.weight_gathering import GatheredWeights
from internlm.core.parallel.linear.weight_gradients import WeightGradients
from internlm.core.parallel.parameter_events import deliver_gradient
from internlm.model.moe.experts import Experts
from internlm.model.ops.grouped_linear import grouped_linear, input_gradient, weight_gradient
from internlm.model.ops.linear_kernels import LinearKernels
from internlm.model.recompute import as_gemm_operator
from internlm.model.roles import Role


class _ExpertWeight:
    """One weight of the experts of a layer, as a group of weights that are gathered together."""

    role = Role.EXPERTS
    kernels = LinearKernels()

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        self.name = name
        self._parameter = parameter

    def parameters(self) -> list[nn.Parameter]:
        return [self._parameter]


class GatheredExpertLinear:
    """`grouped_linear` with gathered weights. Takes the place of `Experts.linear`.

    Args:
        name: of the experts' module.
        experts: whose weights are registered, in the order of their use.
        weights: gathers them.
        weight_gradients: queue of weight gradients that are computed later.
    """

    def __init__(
        self, name: str, experts: Experts, weights: GatheredWeights, weight_gradients: WeightGradients
    ) -> None:
        self.weights = weights
        self.weight_gradients = weight_gradients
        self._groups: dict[nn.Parameter, _ExpertWeight] = {}
        for attribute in ("w13", "w2"):
            parameter = getattr(experts, attribute)
            self._groups[parameter] = _ExpertWeight(f"{name}.{attribute}", parameter)
            weights.register(self._groups[parameter])

    def __call__(self, rows: Tensor, parameter: nn.Parameter, counts: Tensor) -> Tensor:
        """Rows `[M, K]` sorted by expert, this rank's part of `[E, N, K]`, int64 `[E]` -> `[M, N]`. Collective."""
        out: Tensor = _GatheredLinearFunction.apply(self, self._groups[parameter], rows, counts, parameter)
        return out

    def deliver(self, parameter: nn.Parameter, grad: Tensor, rows: Tensor, counts: Tensor) -> None:
        """Compute and reduce the gradient of a weight."""
        gradient = self.weights.deliver(parameter, weight_gradient(grad, rows, counts))
        if gradient is not None:
            deliver_gradient(parameter, gradient)


class _GatheredLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        linear: GatheredExpertLinear,
        group: _ExpertWeight,
        rows: Tensor,
        counts: Tensor,
        parameter: nn.Parameter,
    ) -> Tensor:
        def run_gemm() -> list[Tensor]:
            (weight,) = linear.weights.acquire(group, [parameter], backward=False)
            assert isinstance(weight, Tensor)
            out = grouped_linear(rows, weight, counts)
            linear.weights.release(group)
            return [out]

        (out,) = as_gemm_operator(run_gemm, rows)
        # The parameter is a leaf: kept as it is, as in parallel linear layers.
        ctx.linear, ctx.group, ctx.parameter = linear, group, parameter
        ctx.save_for_backward(rows, counts)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor | None, None, None]:
        linear: GatheredExpertLinear = ctx.linear
        parameter: nn.Parameter = ctx.parameter
        rows, counts = ctx.saved_tensors
        grad_rows = None
        if ctx.needs_input_grad[2]:
            (weight,) = linear.weights.acquire(ctx.group, [parameter], backward=True)
            assert isinstance(weight, Tensor)
            grad_rows = input_gradient(grad, weight, counts)
            linear.weights.release(ctx.group)
        if parameter.requires_grad:
            linear.weight_gradients.compute(partial(linear.deliver, parameter, grad, rows, counts))
        return None, None, grad_rows, None, None
