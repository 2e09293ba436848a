"""The capacity of an expert: the number of tokens of a sample that it takes; those beyond it are dropped.

A sample is a micro-batch of one data rank, T tokens, also where several ranks share them. These ranks exchange one
integer for each choice and one for each token, and then all find the same choices dropped, which are those of one
process. A dropped choice contributes nothing, and its row is not computed.

t tokens of this rank, E experts, k choices of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from internlm.model.moe.noise import Stream, random_bits

Priority = Literal["weight", "position", "choice", "random"]
"""What an expert keeps: the choices with the largest weights; those of the first tokens; the first choices of tokens
before the second ones, each in the order of tokens (GShard); random ones. Where these are equal, the first tokens."""

_BITS = 44
"""Bits of a priority; the number of the expert is above them."""

_STEPS = {torch.float64: 36}
"""Weights are compared in steps of 2**-36, and 2**-16 in fp32: equal tokens, such as the first ones of two documents,
then tie in spite of different rounding, and the first token is kept in every layout."""

_OTHER_STEPS = 16


@dataclass(frozen=True)
class Capacity:
    """How many choices an expert keeps of a sample, and which.

    Sources: GShard, https://arxiv.org/abs/2006.16668; Switch, https://arxiv.org/abs/2101.03961, section 2.2.

    Attributes:
        factor: the capacity is `ceil(factor k T / E)`: 1 is the load at perfect balance.
        eval_factor: the same in evaluation.
        minimum: least capacity.
        priority: which choices are kept.
        renormalizes: whether the weights of a token's kept choices are divided by their sum.
        rounds_up: whether `factor k T / E` is rounded up; otherwise down.
    """

    factor: float
    eval_factor: float
    minimum: int = 0
    priority: Priority = "weight"
    renormalizes: bool = False
    rounds_up: bool = True

    def rows(self, num_tokens: int | Tensor, num_experts: int, top_k: int, *, is_training: bool) -> int | Tensor:
        """The capacity; exact, as `factor` is taken as the decimal fraction that it is written as.

        Args:
            num_tokens: T; on the device if it is a tensor.
            num_experts: E.
            top_k: k.
            is_training: whether `factor` applies.
        """
        share = Fraction(repr(self.factor if is_training else self.eval_factor)) * top_k / num_experts
        rounding = share.denominator - 1 if self.rounds_up else 0
        rows = (num_tokens * share.numerator + rounding) // share.denominator
        return rows.clamp(min=self.minimum) if isinstance(rows, Tensor) else max(rows, self.minimum)

    def keys(
        self, experts: Tensor, weights: Tensor, noise_key: int, positions: Tensor, valid: Tensor | None = None
    ) -> Tensor:
        """The order of choices: those of each expert consecutively, the ones to keep first.

        Args:
            experts: int64 `[t, k]`.
            weights: `[t, k]`, of the choices.
            noise_key: of the sample and layer.
            positions: int64 `[t]`, of the tokens in the sample.
            valid: bool `[t]`; choices of other tokens are dropped and do not count. None: all are valid.

        Returns:
            int64 `[t, k]`, to be sorted; equal ones by token.
        """
        keys = experts << _BITS
        if self.priority == "weight":
            steps = 2.0 ** _STEPS.get(weights.dtype, _OTHER_STEPS)
            most = 2.0**_BITS - 1
            # NaN counts as the largest weight, as in `choose_experts`.
            amounts = (weights.double() * steps).round().nan_to_num(nan=most).clamp(0, most)
            keys = keys + (most - amounts).long()
        elif self.priority == "choice":
            keys = keys + torch.arange(experts.shape[1], device=experts.device)
        elif self.priority == "random":
            keys = keys + random_bits(noise_key, Stream.SELECTION, positions, experts.shape[1])
        return keys if valid is None else keys.masked_fill(~valid[:, None], torch.iinfo(torch.int64).max)


@dataclass(frozen=True)
class SamplePart:
    """This rank's tokens of a sample.

    Attributes:
        index: of this part.
        count: number of parts, equally large.
        join: all parts of a tensor `[t, ...]`, concatenated along dimension 0. Collective.
    """

    index: int = 0
    count: int = 1
    join: Callable[[Tensor], Tensor] = field(default=lambda part: part)

    def positions(self, num_tokens: int, num_rows: int, device: torch.device) -> Tensor:
        """Positions in the sample of this rank's tokens, if it has the same part of each row: int64 `[t]`."""
        width = num_tokens // num_rows
        rows = torch.arange(num_rows, device=device)[:, None] * (width * self.count)
        return (rows + self.index * width + torch.arange(width, device=device)).flatten()

    def joined(self, values: Tensor, positions: Tensor) -> Tensor:
        """Int64 `[t, n]` of this rank's tokens -> `[T, n]` of all, in the order of positions. Collective.

        Args:
            values: of this rank's tokens.
            positions: int64 `[t]`, of the same tokens; those of all ranks are 0 to T - 1.
        """
        if self.count == 1:
            return values
        parts = self.join(torch.cat((positions[:, None], values), dim=1))
        return torch.empty_like(parts[:, 1:]).index_copy_(0, parts[:, 0], parts[:, 1:])


def kept_choices(keys: Tensor, capacity: int | Tensor, num_experts: int, part: SamplePart, positions: Tensor) -> Tensor:
    """The choices that experts keep. Does not wait for the device. Collective over the ranks that share the sample.

    Args:
        keys: int64 `[t, k]`, from `Capacity.keys`.
        capacity: choices of each expert.
        num_experts: E.
        part: this rank's tokens of the sample.
        positions: int64 `[t]`, of these tokens in the sample.

    Returns:
        bool `[t, k]`.
    """
    keys = part.joined(keys, positions)
    in_order, order = keys.flatten().sort(stable=True)
    experts = in_order >> _BITS
    starts = torch.searchsorted(experts, torch.arange(num_experts, device=keys.device))
    ranks = torch.arange(len(experts), device=keys.device) - starts[experts.clamp(max=num_experts - 1)]
    kept = (ranks < capacity) & (experts < num_experts)
    return torch.empty_like(kept).scatter_(0, order, kept).view(keys.shape)[positions]


def kept_weights(weights: Tensor, kept: Tensor, capacity: Capacity, scale: float = 1.0) -> Tensor:
    """The factors on the outputs of experts after dropping.

    Args:
        weights: `[t, k]`, from `weights_of`, with gradient.
        kept: bool `[t, k]`.
        capacity: of the router.
        scale: of the router's form, which `weights` have as a factor.

    Returns:
        `[t, k]`, zeros for dropped choices.
    """
    weights = weights.where(kept, 0.0)
    if not capacity.renormalizes:
        return weights
    total = weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).eps)
    return weights / total * scale
