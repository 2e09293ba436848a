"""What the routers of a model count in a step, summed over all ranks, and the losses and biases that balance them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from internlm.core.communication.collectives import all_reduce
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.experts.layers import routed_tokens
from internlm.core.parallel.model_parallel import parallel_of
from internlm.data.batch import MicroBatch
from internlm.model.moe.balance import BiasRule, sequences_of, updated_bias
from internlm.model.moe.router import RouterLosses, routers_of
from internlm.model.moe.router_sums import RouterSums
from internlm.model.moe.sample_tokens import SampleTokens
from internlm.model.moe.settings import ExpertSettings


class Replay(Protocol):
    """Writes or reads the choices of routers; see `internlm.core.routing_replay`."""

    def begin_micro_batch(self, number: int, shape: tuple[int, int], positions: Tensor) -> None:
        """Called before the forward pass of a micro-batch in a chunk.

        Args:
            number: of the micro-batch of this data rank.
            shape: B and S of the micro-batch.
            positions: int64 `[t]` on the host: those of the tokens that this rank routes among all of the micro-batch,
                row by row. Those of padding behind the micro-batch are B S or more.
        """


class RoutingStatistics:
    """The routers of a model in training.

    Args:
        chunks: of this rank.
        context: this rank's position and process groups.
        losses: coefficients of the routers' losses.
        bias_rule: how selection biases change.
        seed: see the attribute.

    Attributes:
        layers_with_experts: numbers of those of the whole model.
        seed: of routers' noise; a resumed run must have the same one to draw the same numbers.
        num_micro_batches: of each data rank in this step.
        micro_batch: number of the one whose forward pass runs.
        replay: of the routers' choices; None: they are neither written nor read.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        context: ParallelContext,
        losses: RouterLosses,
        bias_rule: BiasRule,
        seed: int = 0,
    ) -> None:
        self._losses = losses
        self._bias_rule = bias_rule
        self.seed = seed
        self._context = context
        self._routers = routers_of(chunks)
        self._routers_of_chunks = [routers_of([chunk]) for chunk in chunks]
        self._parallel = parallel_of(chunks[0])
        architecture = getattr(chunks[0], "architecture", None)
        # A stage without a router takes part in the sums too.
        self._experts = None if architecture is None else architecture.experts
        self._num_layers = 0 if architecture is None else architecture.num_layers + architecture.num_multi_token
        self.layers_with_experts: list[int] = [] if architecture is None else architecture.layers_with_experts
        self._axes = ["data", "pipeline", self._parallel.routing_axis]
        self._num_samples = 1
        self.num_micro_batches = 1
        self.micro_batch = 0
        self.replay: Replay | None = None
        self._num_earlier = 0
        self._samples: Sequence[int] = ()
        self._sample = 0

    def begin_step(self, num_micro_batches: int, loss_scale: Tensor, samples: Sequence[int] = ()) -> None:
        """Start to count.

        Args:
            num_micro_batches: of each data rank in this step.
            loss_scale: scalar fp32, factor on the loss in backward.
            samples: numbers of this rank's micro-batches, counted over the whole run, as keys of noise; where they are
                unknown, micro-batches are counted from the first step of this object.
        """
        self.num_micro_batches = num_micro_batches
        first = self._num_earlier + self._context.index("data") * num_micro_batches
        self._samples = [*samples, *range(first, first + num_micro_batches)[len(samples) :]]
        self._num_samples = num_micro_batches * self._context.size("data")
        self._num_earlier += self._num_samples
        for router in self._routers:
            router.begin_step(self._losses, loss_scale / self._num_samples, self.seed)

    def begin_micro_batch(self, number: int, shape: tuple[int, int], token_indices: Tensor | None) -> None:
        """Start the forward pass of a micro-batch of this data rank in one chunk.

        Args:
            number: of the micro-batch.
            shape: B and S of the micro-batch, before its tokens were dealt to context ranks.
            token_indices: see `MicroBatch`; on the host.
        """
        self.micro_batch = number
        self._sample = self._samples[number]
        if self.replay is not None:
            indices = torch.arange(math.prod(shape)).view(shape) if token_indices is None else token_indices
            self.replay.begin_micro_batch(number, shape, routed_tokens(indices, self._parallel).flatten())

    @contextmanager
    def forward_pass(self, chunk: int, micro: MicroBatch) -> Iterator[None]:
        """Tell the routers of a chunk which tokens a forward pass has.

        Args:
            chunk: number of the chunk on this rank.
            micro: the micro-batch, on the device.
        """
        routers = self._routers_of_chunks[chunk]
        sample = self._sample_tokens(micro) if routers else SampleTokens()
        for router in routers:
            router.sample = sample
        try:
            yield
        finally:
            # Later passes may be those of a hook that generates text.
            for router in routers:
                router.sample = SampleTokens()

    @torch.no_grad()
    def _sample_tokens(self, micro: MicroBatch) -> SampleTokens:
        sample = SampleTokens(number=self._sample)
        if micro.is_padding is not None:
            num_valid = micro.num_sample_tokens - micro.num_padding_tokens
            sample = replace(
                sample,
                valid=~routed_tokens(micro.is_padding, self._parallel).flatten(),
                num_valid=torch.full((), num_valid, device=micro.is_padding.device),
            )
        if self._losses.sequence:
            sequences, number = _sequences(micro)
            sequences = routed_tokens(sequences, self._parallel).flatten()
            sample = replace(sample, sequences=sequences, num_sequences=number)
        if micro.token_indices is not None:
            sample = replace(sample, positions=routed_tokens(micro.token_indices, self._parallel).flatten())
        return sample

    @torch.no_grad()
    def finish_step(self, skipped: Tensor) -> dict[str, Tensor]:
        """Update the selection biases, and return the metrics of the step. Collective.

        Metrics are scalars, the same on all ranks; none for a model without routers.

        A step whose update the optimizer skips changes no bias either: it would move towards loads of activations that
        overflowed.

        `moe/balance_loss`, `moe/z_loss` and `moe/sequence_loss` are sums over layers of means over samples, without
        their coefficients, the last one only if it has one;
        `moe/load/N` is the largest number of tokens of an expert of layer N over the mean, `moe/max_load` its maximum
        over layers. `moe/entropy/N` is the entropy of the mean of the tokens' distributions over experts,
        `moe/token_entropy/N` the mean of their entropies, both over log E; `moe/min_entropy` and
        `moe/min_token_entropy` are the minima over layers. `moe/bias_range/N` is the largest minus the smallest
        selection bias with which the experts of the step were chosen, `moe/max_bias_range` its maximum.
        With a capacity, `moe/dropped/N` is the share of the choices of layer N that were dropped, and `moe/dropped`
        that of all layers.

        Args:
            skipped: 1.0 if the optimizer skipped the update.
        """
        self._sample = 0
        if self._experts is None:
            return {}
        num_experts = self._experts.form.num_experts
        sums = RouterSums.zeros((self._num_layers,), num_experts, self._context.device)
        # Ranks with equal biases add them once.
        adds_biases = all(self._context.index(axis) == 0 for axis in self._axes if axis != "pipeline")
        for router in self._routers:
            sums.values[router.layer] += router.sums().values
            if adds_biases and router.selection_bias is not None:
                sums.bias_range[router.layer] = router.selection_bias.amax() - router.selection_bias.amin()
        for axis in self._axes:
            all_reduce(sums.values, self._context.group(axis))
        self._update_biases(sums.counts.long(), skipped)
        return self._metrics(sums, self._experts)

    def _metrics(self, sums: RouterSums, experts: ExpertSettings) -> dict[str, Tensor]:
        layers = self.layers_with_experts
        losses = sums.losses.sum(0).float() / self._num_samples
        loads = sums.counts.amax(-1) / sums.counts.mean(-1).clamp(min=1e-9)
        num_tokens = (sums.counts.sum(-1) / experts.form.top_k).clamp(min=1.0)
        largest = math.log(experts.form.num_experts)
        entropies = torch.special.entr(sums.probabilities / num_tokens[:, None]).sum(-1) / largest
        token_entropies = sums.entropy / num_tokens / largest
        values = {"load": loads, "entropy": entropies, "token_entropy": token_entropies}
        extremes = {"max_load": loads.amax()}
        if experts.form.has_bias:
            values["bias_range"] = sums.bias_range
            extremes["max_bias_range"] = sums.bias_range.amax()
        if experts.selection.capacity is not None:
            chosen = sums.counts.sum(-1)
            values["dropped"] = sums.dropped / chosen.clamp(min=1)
            extremes["dropped"] = sums.dropped.sum() / chosen.sum().clamp(min=1)
        by_layer = {name: value.float().unbind() for name, value in values.items()}
        for name in ("entropy", "token_entropy"):
            extremes[f"min_{name}"] = torch.stack([by_layer[name][layer] for layer in layers]).amin()
        return {
            "moe/balance_loss": losses[0],
            "moe/z_loss": losses[1],
            **({"moe/sequence_loss": losses[2]} if self._losses.sequence else {}),
            **{f"moe/{name}": value.float() for name, value in extremes.items()},
            **{f"moe/{name}/{layer}": value[layer] for name, value in by_layer.items() for layer in layers},
        }

    def _update_biases(self, counts: Tensor, skipped: Tensor) -> None:
        """Update the biases of this rank's routers; `counts` is int64 `[layers, E]`."""
        if self._bias_rule.rate == 0.0:
            return
        for router in self._routers:
            bias = router.selection_bias
            if bias is not None and not router.has_frozen_bias:
                bias.copy_(updated_bias(bias, counts[router.layer], self._bias_rule).where(skipped == 0, bias))


def _sequences(micro: MicroBatch) -> tuple[Tensor, int]:
    """The sequence of each token, int64 `[B, S]`, and a bound on the number of sequences.

    For packed rows a power of two: a compiled layer has a graph for each bound.
    """
    rows, width = micro.input_ids.shape
    device = micro.input_ids.device
    if micro.cu_seqlens is None or micro.lengths is None:
        return torch.arange(rows, device=device)[:, None].expand(rows, width), rows
    indices = torch.arange(width, device=device) if micro.token_indices is None else micro.token_indices[0]
    bound = 1 << len(micro.lengths).bit_length()
    return sequences_of(micro.cu_seqlens, indices)[None], bound
