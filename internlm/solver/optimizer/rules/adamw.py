"""AdamW: Loshchilov and Hutter 2019, arXiv:1711.05101, by PyTorch's fused kernel, or by our own on GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from internlm.solver.optimizer.rules.update_rule import HyperParameters, UpdateStep


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay.

    Attributes:
        betas: decay rates of the first and second moment.
        eps: added to the denominator.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8

    state_names: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    works_on: ClassVar[Literal["elements", "matrices"]] = "elements"

    @property
    def hyper_parameters(self) -> HyperParameters:
        """`beta1`, `beta2` and `eps`."""
        return {"beta1": self.betas[0], "beta2": self.betas[1], "eps": self.eps}

    def update(self, weights: Tensor, gradient: Tensor, state: Mapping[str, Tensor], step: UpdateStep) -> None:
        """See `UpdateRule.update`."""
        rates = step.hyper_parameters
        adamw(
            [weights],
            [gradient],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            # The kernel increments it in place, but several parts of a shard take the same update.
            [step.num_updates.clone()],
            fused=True,
            # The kernel reads both on the device: it divides the gradient by grad_scale, and does nothing if found_inf
            # is 1.
            grad_scale=step.divisor,
            found_inf=step.skipped,
            amsgrad=False,
            beta1=rates["beta1"],
            beta2=rates["beta2"],
            lr=rates["lr"],
            weight_decay=rates["weight_decay"],
            eps=rates["eps"],
            maximize=False,
        )

    def update_and_round(
        self,
        weights: Tensor,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        step: UpdateStep,
        rounded: Tensor | None,
    ) -> None:
        """See `RoundingUpdateRule.update_and_round`."""
        from internlm.solver.optimizer.triton_kernels import adamw as adamw_kernel

        rates, number = step.hyper_parameters, step.num_updates.double() + 1
        adamw_kernel(
            weights,
            gradient,
            state["exp_avg"],
            state["exp_avg_sq"],
            rounded,
            # In float64: the difference from 1 is small in early updates.
            corrections=torch.stack((1 - rates["beta1"] ** number, (1 - rates["beta2"] ** number).sqrt())).float(),
            divisor=step.divisor,
            skipped=step.skipped,
            **rates,
        )

    def was_trained(self, state: Mapping[str, Tensor]) -> Tensor:
        """Whether the second moment is non-zero: it is a sum of squares, which only underflow returns to zero."""
        return state["exp_avg_sq"].any()
