"""The losses of layers that predict later tokens, and what they count.

Layer m of D predicts the token m + 1 positions later, from the tokens up to m positions later. Its loss is the mean of
the cross entropy over the tokens of the global batch that have such a label; the loss of the step grows by

    coefficient / D * sum over m of loss_m.

Source: DeepSeek-V3, https://arxiv.org/abs/2412.19437, equations 24 and 25.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from internlm.core.communication.collectives import all_reduce
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.model_parallel import parallel_of
from internlm.data.batch import IGNORE_INDEX, Batch, LaterTokens, MicroBatch
from internlm.model.ops.cross_entropy import LossFunction


def later_tokens(micro: MicroBatch, offset: int) -> LaterTokens:
    """Tokens and labels `offset` positions later in the same attention segment.

    Nothing crosses the end of a segment, nor that of a row. They are taken before tokens are split over ranks.
    """
    ids, labels, positions = micro.input_ids, micro.labels, micro.position_ids
    # A later segment begins after this one did, so its positions are smaller.
    is_same = positions.roll(-offset, 1) == positions + offset
    is_same[:, max(0, ids.shape[1] - offset) :] = False
    return LaterTokens(
        ids.roll(-offset, 1).masked_fill(~is_same, 0), labels.roll(-offset, 1).masked_fill(~is_same, IGNORE_INDEX)
    )


class MultiTokenLoss:
    """The losses of a model's layers that predict later tokens, in training.

    Args:
        chunks: of this rank.
        context: this rank's position and process groups.
        coefficient: of the mean of these losses.

    Attributes:
        num_layers: D; 0 for a model without such layers.
    """

    def __init__(self, chunks: Sequence[nn.Module], context: ParallelContext, coefficient: float) -> None:
        architecture = getattr(chunks[0], "architecture", None)
        self.num_layers: int = 0 if architecture is None else architecture.num_multi_token
        self._context = context
        self._coefficient = coefficient
        device = context.device
        self._num_valid = torch.ones(self.num_layers, device=device)
        self._factors = torch.zeros(self.num_layers, device=device)
        # Sum of losses and number of correct tokens, of each layer.
        self._sums = torch.zeros(self.num_layers, 2, dtype=torch.float64, device=device)

    def begin_step(self, batch: Batch, loss_scale: Tensor) -> None:
        """Count the labels of the global batch. Collective for a model with such layers.

        Args:
            batch: this data rank's micro-batches, on the host.
            loss_scale: scalar fp32, factor on the loss in backward.
        """
        if self.num_layers == 0:
            return
        counts = [
            sum(int((later_tokens(micro, m).labels != IGNORE_INDEX).sum()) for micro in batch.micro_batches)
            for m in range(1, self.num_layers + 1)
        ]
        # Fills on the device; a copy from the host would wait.
        own = torch.stack([torch.full((), float(count), device=self._context.device) for count in counts])
        self._num_valid = all_reduce(own, self._context.group("data")).clamp(min=1.0)
        self._factors = self._coefficient / self.num_layers * loss_scale / self._num_valid
        self._sums.zero_()

    def add_later_tokens(self, micro: MicroBatch) -> MicroBatch:
        """Add what each of these layers reads and predicts to a micro-batch, on the host."""
        return replace(micro, later=[later_tokens(micro, m) for m in range(1, self.num_layers + 1)])

    def loss(
        self,
        model: nn.Module,
        head: Tensor,
        hidden: Sequence[Tensor],
        tokens: Sequence[LaterTokens],
        micro: MicroBatch,
        loss: LossFunction,
    ) -> Tensor:
        """The losses of a micro-batch, summed with their factors: scalar fp32, to be differentiated.

        Args:
            model: the chunk that holds the head.
            head: its weight, from `ModelParallel.head_weight`.
            hidden: output of each of these layers, `[B, S', h]`.
            tokens: from `of`.
            micro: the micro-batch, on the device.
            loss: see `LossFunction`.
        """
        parallel = parallel_of(model)
        total = torch.zeros((), device=self._context.device)
        for number, (states, later) in enumerate(zip(hidden, tokens, strict=True)):
            output = parallel.head_loss(model, states, later.labels, micro.type_ids, loss, weight=head).loss
            total = total + output.loss_sum * self._factors[number]
            self._sums[number, 0] += output.loss_sum.detach()
            if output.correct is not None:
                self._sums[number, 1] += output.correct.sum()
        return total

    def result(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Scalar metrics of the step, the same on all ranks; empty for a model without such layers. Collective.

        `multi_token/loss/N` is the mean loss of layer N of D, `multi_token/acc/N` the share of its tokens that are
        predicted correctly.

        Args:
            reduce: sums a tensor over all ranks that compute the loss of different tokens.
        """
        if self.num_layers == 0:
            return {}
        means = (reduce(self._sums.clone()) / self._num_valid[:, None]).float()
        return {
            f"multi_token/{name}/{number + 1}": means[number, column]
            for column, name in enumerate(("loss", "acc"))
            for number in range(self.num_layers)
        }
