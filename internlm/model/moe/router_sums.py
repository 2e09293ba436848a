"""What a router sums over the tokens of a step, in one tensor, so that ranks add theirs in one all-reduce."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LOSSES = ("balance", "z", "sequence")
"""The losses of a router, in the order of `RouterSums.losses`."""


@dataclass(frozen=True)
class RouterSums:
    """Sums over valid tokens, of one router or `[layers, ...]` of several; float64, views of one tensor.

    Attributes:
        values: `[..., N]`, all of them.
        counts: `[..., E]`, tokens of each expert.
        probabilities: `[..., E]`, sums of the distributions over experts.
        losses: `[..., 3]`, see `LOSSES`; each the sum over samples.
        dropped: `[...]`, choices beyond the capacity.
        entropy: `[...]`, sum of the entropies of the distributions, in nats.
        bias_range: `[...]`, largest minus smallest selection bias.
    """

    values: Tensor
    num_experts: int

    @classmethod
    def zeros(cls, shape: tuple[int, ...], num_experts: int, device: torch.device) -> RouterSums:
        """Sums over no token."""
        width = 2 * num_experts + len(LOSSES) + 3
        return cls(torch.zeros(*shape, width, dtype=torch.float64, device=device), num_experts)

    @property
    def counts(self) -> Tensor:
        return self.values[..., : self.num_experts]

    @property
    def probabilities(self) -> Tensor:
        return self.values[..., self.num_experts : 2 * self.num_experts]

    @property
    def losses(self) -> Tensor:
        return self.values[..., 2 * self.num_experts : 2 * self.num_experts + len(LOSSES)]

    @property
    def dropped(self) -> Tensor:
        return self.values[..., -3]

    @property
    def entropy(self) -> Tensor:
        return self.values[..., -2]

    @property
    def bias_range(self) -> Tensor:
        return self.values[..., -1]

    def add(self, counts: Tensor, distribution: Tensor, losses: Tensor, *, valid: Tensor | None = None) -> None:
        """Add the tokens of a forward pass.

        Args:
            counts: int64 `[E]`.
            distribution: `[t, E]`, from `expert_distribution`.
            losses: `[3]`.
            valid: bool `[t]`, false for padding; None: all tokens are valid.
        """
        if valid is not None:
            # The entropy of a row of zeros is 0.
            distribution = distribution.where(valid[:, None], 0.0)
        self.counts.add_(counts)
        self.probabilities.add_(distribution.sum(0))
        self.losses.add_(losses)
        self.entropy.add_(torch.special.entr(distribution).sum())
