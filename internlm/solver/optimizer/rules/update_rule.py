"""The protocol of an update rule: how a weight changes, given its gradient and its state.

A rule knows only tensors and numbers. Sharding, reduction, mixed precision, parts and checkpoints are left to the
optimizer (`internlm.solver.optimizer.hybrid_zero`), which works with any rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from internlm.core.optimizer_protocol import HyperParameters


@dataclass(frozen=True)
class UpdateStep:
    """The arguments of an update that all weights share; for a rule, those of one parameter group.

    Attributes:
        hyper_parameters: "lr" and the rule's own; for a rule also "weight_decay".
        num_updates: scalar fp32 on the device of the masters, number of updates before this one without skipped ones;
            read-only for rules.
        divisor: scalar fp32; dividing the gradient by it removes the loss scale and clips.
        skipped: scalar fp32; with 1.0 nothing may change.
    """

    hyper_parameters: HyperParameters
    num_updates: Tensor
    divisor: Tensor
    skipped: Tensor


class UpdateRule(Protocol):
    """How weights are updated.

    Attributes:
        state_names: names of the state tensors of a weight, which have its shape and start at zero; also their keys in
            checkpoints.
        works_on: "elements" if each element is updated independently, so that any flat part of a shard can be updated
            alone; "matrices" if the rule needs a full weight, which no optimizer here supports yet.
        hyper_parameters: defaults of the rule's own hyper-parameters.
    """

    @property
    def state_names(self) -> tuple[str, ...]: ...

    @property
    def works_on(self) -> Literal["elements", "matrices"]: ...

    @property
    def hyper_parameters(self) -> HyperParameters: ...

    def update(self, weights: Tensor, gradient: Tensor, state: Mapping[str, Tensor], step: UpdateStep) -> None:
        """Update `weights` and `state` in place; nothing may wait for the device.

        Args:
            weights: flat, fp32 or float64.
            gradient: of the same shape and dtype; divided by `step.divisor` in place, unless the step is skipped.
            state: name -> tensor of the same shape and dtype, for each of `state_names`.
            step: with the hyper-parameters of the parameter group.
        """

    def was_trained(self, state: Mapping[str, Tensor]) -> Tensor:
        """Scalar bool: whether the state shows that the weight had a gradient in some earlier step."""


@runtime_checkable
class RoundingUpdateRule(UpdateRule, Protocol):
    """A rule with a GPU kernel that also rounds the weights: one pass over memory instead of two or three."""

    def update_and_round(
        self,
        weights: Tensor,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        step: UpdateStep,
        rounded: Tensor | None,
    ) -> None:
        """`update` of fp32 weights on a GPU where `internlm.utils.triton_support` finds no obstacle.

        Args:
            weights, state, step: see `UpdateRule.update`.
            gradient: in any dtype; unchanged.
            rounded: receives the updated weights in its dtype; None: nothing does.
        """
