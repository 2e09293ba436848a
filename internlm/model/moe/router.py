"""The router of an expert layer, its losses, and what it counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from internlm.model.initialization import Normal, Zeros, set_initializer
from internlm.model.moe.balance import (
    counts_by_expert,
    counts_by_sequence,
    load_balancing_loss,
    sequence_balancing_loss,
    z_loss,
)
from internlm.model.moe.capacity import Capacity, SamplePart, kept_choices, kept_weights
from internlm.model.moe.choice import ExpertChoice, choose, handle_of
from internlm.model.moe.noise import choose_with_noise, jittered, noise_key
from internlm.model.moe.router_form import RouterForm
from internlm.model.moe.router_sums import RouterSums
from internlm.model.moe.routing import choose_experts, expert_distribution, probabilities, weights_of
from internlm.model.moe.sample_tokens import SampleTokens
from internlm.model.moe.selection import Selection
from internlm.model.recompute import as_routing_operator

if TYPE_CHECKING:
    from internlm.model.architecture import Architecture


class Routing(NamedTuple):
    """Where a router sends tokens.

    Attributes:
        experts: int64 `[T, k]`.
        weights: fp32 `[T, k]`, factors on the outputs of these experts.
        loss: scalar fp32, added to the loss of the step by `with_added_loss`; None outside of training.
        kept: bool `[T, k]`, false for choices that are dropped, whose weights are 0; None: all are kept.
    """

    experts: Tensor
    weights: Tensor
    loss: Tensor | None
    kept: Tensor | None = None


@dataclass(frozen=True)
class RouterLosses:
    """Coefficients of the losses of every router; the total loss is the cross entropy plus their weighted sum.

    Each loss of a layer is the mean over samples, where a sample is a micro-batch of one data rank. So its value does
    not depend on how many ranks share a sample, nor on which rank has which samples.

    Attributes:
        balance: of `load_balancing_loss`.
        z: of `z_loss`.
        sequence: of `sequence_balancing_loss`.
    """

    balance: float = 0.0
    z: float = 0.0
    sequence: float = 0.0


class Router(nn.Module):
    """Chooses experts for tokens, in fp32 from the input of the layer: a choice in bf16 has ties and flips.

    Attributes:
        weight: fp32 (float64 in a float64 model) `[E, h]`.
        bias: `[E]`, added to the logits; None: none.
        selection_bias: `[E]`, in the dtype of `weight`; None if the form has none. It has no gradient: the rule of
            `balance.updated_bias` changes it between steps.
        has_frozen_bias: the rule does not change the selection bias.
        layer: number of the layer.
        sum_over_sample: sums a tensor over the ranks that have the other tokens of a sample.
        num_sharing: number of these ranks.
        replay: chosen experts `[T, k]` -> the experts that are used instead in training; None: the chosen ones.
        sample: the tokens of the next forward pass.
        part: this rank's tokens among those of the sample.
        selection: capacity and noise.
    """

    def __init__(
        self,
        architecture: Architecture,
        form: RouterForm,
        layer: int,
        selection: Selection | None = None,
        *,
        has_bias: bool = False,
    ) -> None:
        super().__init__()
        self.form = form
        self.layer = layer
        self.selection = selection or Selection()
        dtype = torch.promote_types(architecture.dtype, torch.float32)
        self.weight = nn.Parameter(torch.empty(form.num_experts, architecture.hidden_size, dtype=dtype))
        set_initializer(self.weight, Normal(architecture.init.ffn_other))
        self.bias: nn.Parameter | None = None
        if has_bias:
            self.bias = nn.Parameter(torch.empty(form.num_experts, dtype=dtype))
            set_initializer(self.bias, Zeros())
        self.selection_bias: nn.Parameter | None = None
        self.has_frozen_bias = False
        if form.has_bias:
            self.selection_bias = nn.Parameter(torch.empty(form.num_experts, dtype=dtype), requires_grad=False)
            set_initializer(self.selection_bias, Zeros())
        self.sum_over_sample: Callable[[Tensor], Tensor] = lambda tensor: tensor
        self.num_sharing = 1
        self.replay: Callable[[Tensor], Tensor] | None = None
        self.sample = SampleTokens()
        self.part = SamplePart()
        self._seed = 0
        self._losses: RouterLosses | None = None
        self._sample_weight: Tensor | None = None
        self._sums: RouterSums | None = None
        self._handle = handle_of(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy is another router.
        super().__setstate__(state)
        self._handle = handle_of(self)

    def forward(self, x: Tensor, num_rows: int = 1) -> Routing:
        """Tokens `[T, h]` -> their experts.

        Args:
            x: row by row.
            num_rows: number of rows, of which this rank has an equal part each, unless the sample has positions; counts
                for capacity and noise only.
        """
        is_training = self._losses is not None and torch.is_grad_enabled()
        # That of the forward pass, when recomputation follows those of later samples.
        sample, selection = self.sample, self.selection
        x = x.to(self.weight.dtype)
        if is_training and selection.noise.jitter:

            def key_and_positions() -> list[Tensor]:
                key = torch.full((), self._noise_key(sample), device=x.device)
                return [key, self._positions(x, sample, num_rows).clone()]

            x = jittered(x, selection.noise, *as_routing_operator(key_and_positions, x))
        logits = F.linear(x, self.weight, self.bias)
        scores = probabilities(logits, self.form)
        choice = choose(
            self._handle,
            logits,
            scores,
            sample,
            num_rows,
            top_k=self.form.top_k,
            drops=selection.capacity is not None,
            is_training=is_training,
        )
        loss = None
        if is_training:
            assert self._losses is not None and self._sample_weight is not None
            balance, z, sequence = self._losses_of(logits, scores, choice)
            total = self._losses.balance * balance + self._losses.z * z + self._losses.sequence * sequence
            loss = total * self._sample_weight
        weights, kept = weights_of(scores, choice.experts, self.form), choice.kept
        if selection.capacity is None:
            return Routing(choice.experts, weights, loss)
        weights = kept_weights(weights, kept, selection.capacity, self.form.scale)
        return Routing(choice.experts, weights, loss, kept)

    def choose(
        self, logits: Tensor, scores: Tensor, sample: SampleTokens, num_rows: int, *, is_training: bool
    ) -> ExpertChoice:
        """See `Chooser`. Collective over the ranks that share a sample."""
        sample = replace(sample, positions=self.sample.positions, number=self.sample.number)
        selection, key = self.selection, self._noise_key(sample)
        if is_training and selection.noise.gumbel != "none":
            positions = self._positions(logits, sample, num_rows)
            args = self.form, selection.noise, key, positions, self.selection_bias
            experts = choose_with_noise(logits, scores, *args)
        else:
            experts = choose_experts(scores, self.form, self.selection_bias)
        if is_training and self.replay is not None:
            # Results of an operator are its caller's, but the replay keeps what it returns.
            experts = self.replay(experts).clone()
        kept = experts.new_empty(0, dtype=torch.bool)
        if selection.capacity is not None:
            positions = self._positions(logits, sample, num_rows)
            kept = self._kept(selection.capacity, experts, scores, sample, key, positions)
        if not is_training:
            return ExpertChoice(experts, kept, *(experts.new_empty(0) for _ in range(5)))
        own = counts_by_expert(experts, self.form.num_experts, valid=sample.valid)
        choice = self._counted(experts, own, sample)._replace(kept=kept)
        assert self._sums is not None
        losses = torch.stack(self._losses_of(logits, scores, choice))
        self._sums.add(own, expert_distribution(scores, self.form), losses, valid=sample.valid)
        if selection.capacity is not None:
            self._sums.dropped.add_(own.sum() - kept.sum())
        return choice

    def _positions(self, tokens: Tensor, sample: SampleTokens, num_rows: int) -> Tensor:
        """Positions in the sample of these tokens, `[t, ...]`."""
        if sample.positions is not None:
            return sample.positions
        return self.part.positions(tokens.shape[0], num_rows, tokens.device)

    def _kept(
        self, capacity: Capacity, experts: Tensor, scores: Tensor, sample: SampleTokens, key: int, positions: Tensor
    ) -> Tensor:
        """The choices that are not dropped, bool `[T, k]`. Collective."""
        keys = capacity.keys(experts, weights_of(scores, experts, self.form), key, positions, sample.valid)
        num_tokens = positions.shape[0] * self.part.count if sample.num_valid is None else sample.num_valid
        rows = capacity.rows(num_tokens, self.form.num_experts, self.form.top_k, is_training=self.training)
        return kept_choices(keys, rows, self.form.num_experts, self.part, positions)

    def _counted(self, experts: Tensor, own: Tensor, sample: SampleTokens) -> ExpertChoice:
        """Counts over the whole sample. Collective; called without gradients."""
        num_experts = self.form.num_experts
        valid, num_valid, sequences, sequence_counts = (experts.new_empty(0) for _ in range(4))
        if sample.valid is not None and sample.num_valid is not None:
            valid, num_valid = sample.valid.clone(), sample.num_valid.clone()
        if sample.sequences is not None:
            sequences = sample.sequences.clone()
            number = sample.num_sequences
            sequence_counts = counts_by_sequence(experts, sequences, number, num_experts, valid=sample.valid)
            sequence_counts = self.sum_over_sample(sequence_counts)
        if self.selection.balances_first:
            own = counts_by_expert(experts[:, :1], num_experts, valid=sample.valid)
        counts = self.sum_over_sample(own)
        return ExpertChoice(experts, counts.new_empty(0), counts, valid, num_valid, sequences, sequence_counts)

    def _noise_key(self, sample: SampleTokens) -> int:
        return noise_key(self._seed, sample.number, self.layer)

    def _losses_of(self, logits: Tensor, scores: Tensor, choice: ExpertChoice) -> tuple[Tensor, Tensor, Tensor]:
        """(balance, z, sequence) of this rank's tokens, all scalars; the last one is 0 if its coefficient is."""
        has_padding, has_sequences = choice.valid.numel() > 0, choice.sequences.numel() > 0
        valid = choice.valid if has_padding else None
        num_tokens = choice.num_valid if has_padding else scores.shape[0] * self.num_sharing
        distribution = expert_distribution(scores, self.form)
        num_counted = 1 if self.selection.balances_first else self.form.top_k
        balance = load_balancing_loss(distribution, choice.counts, num_tokens, num_counted, valid=valid)
        z = z_loss(logits, num_tokens, valid=valid)
        if not has_sequences:
            return balance, z, z.new_zeros(())
        sequence = sequence_balancing_loss(
            distribution, choice.sequence_counts, choice.sequences, num_tokens, valid=valid
        )
        return balance, z, sequence

    # -- numbers of a step ----------------------------------------------------------------------------------------

    def begin_step(self, losses: RouterLosses, sample_weight: Tensor, seed: int = 0) -> None:
        """Start a training step: until the next one, forward passes with gradients count, and return their losses.

        Args:
            losses: coefficients.
            sample_weight: scalar fp32, factor on the losses of a sample: loss scale over the number of samples.
            seed: of random numbers.
        """
        self._seed = seed
        self._losses = losses
        self._sample_weight = sample_weight
        self._sums = RouterSums.zeros((), self.form.num_experts, self.weight.device)

    def sums(self) -> RouterSums:
        """Over this rank's tokens in the step, without the range of the bias."""
        assert self._sums is not None
        return self._sums


def routers_of(models: Iterable[nn.Module]) -> list[Router]:
    """The routers of some models, in the order of their layers."""
    routers = [module for model in models for module in model.modules() if isinstance(module, Router)]
    return sorted(routers, key=lambda router: router.layer)


def with_added_loss(x: Tensor, loss: Tensor | None) -> Tensor:
    """`x`, through whose backward pass `loss` gets the gradient 1: it is added to the loss that x contributes to."""
    if loss is None or not torch.is_grad_enabled():
        return x
    result: Tensor = _AddLoss.apply(x, loss)
    return result


class _AddLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss.dtype, loss.device
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        dtype, device = ctx.like
        return grad, torch.ones((), dtype=dtype, device=device)
