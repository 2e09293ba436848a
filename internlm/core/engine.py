"""One optimisation step: a batch goes in, the weights change, numbers come out.

The engine knows a model, an optimizer and a schedule by the protocol they fulfil; it knows nothing of configs, files,
logging or where batches come from.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from internlm.core.communication.collectives import all_reduce
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.scheduler.executor import execute
from internlm.core.scheduler.schedules import Schedule, non_pipeline
from internlm.data.batch import Batch, MicroBatch
from internlm.model.ops.attention import Segments
from internlm.model.ops.cross_entropy import LossFunction, LossOutput


class StepResult(Protocol):
    """What an optimizer says of one step: scalar fp32 tensors."""

    @property
    def grad_norm(self) -> Tensor:
        """Global norm before clipping, loss scale removed."""

    @property
    def skipped(self) -> Tensor:
        """1.0 when the update was skipped."""


class Optimizer(Protocol):
    """What the engine needs of an optimizer; see `HybridZeroOptimizer`."""

    @property
    def loss_scale(self) -> Tensor:
        """Scalar fp32 by which the loss is multiplied before backward."""

    @property
    def beta2(self) -> float:
        """Second AdamW coefficient of the last step."""

    def begin_step(self, num_backwards: int) -> None:
        """Start with no gradients; so many backward passes will follow."""

    def step(self, lr: float, beta2: float | None) -> StepResult:
        """Reduce, clip, update."""

    def finish_gathering(self) -> None:
        """Wait until all parameters may be read."""


class TokenSink(Protocol):
    """Takes in what is known of each token, for metrics; see `internlm.eval.metrics`."""

    def update(self, token_losses: Tensor, correct: Tensor, labels: Tensor, type_ids: Tensor) -> None:
        """Add the tokens of one micro batch."""


class TokenStatistics(TokenSink, Protocol):
    """Makes the metrics of a training step."""

    def result(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Scalar metrics over all tokens since the last call, on all data ranks."""


@dataclass
class EngineResult:
    """What one step did; tensors are scalars on the device, equal on every rank.

    Attributes:
        loss: fp32, mean over the valid tokens of the global batch.
        grad_norm: fp32 global norm before clipping.
        skipped: fp32, 1.0 when the update was skipped.
        loss_scale: fp32, the scale used in this step.
        num_valid_tokens: fp32, of the global batch.
        statistics: from `TokenStatistics`.
        seconds: host time by phase.
    """

    loss: Tensor
    grad_norm: Tensor
    skipped: Tensor
    loss_scale: Tensor
    num_valid_tokens: Tensor
    statistics: dict[str, Tensor]
    seconds: dict[str, float]


class Engine:
    """Runs forward, backward and update of one global batch.

    The loss is the sum over all valid tokens of the global batch divided by their number, whatever the number of ranks
    and micro batches; a batch without a valid token gives loss 0 and zero gradients.

    Args:
        model: after `parallelize`; `model(input_ids, position_ids, segments)` gives hidden states `[B, S, h]`, and
            `model.head_weight()` the output head `[V, h]`.
        optimizer: see `Optimizer`.
        context: where this rank stands.
        loss: see `LossFunction`; `internlm.model.ops.cross_entropy.linear_cross_entropy` is one.
        statistics: collects metrics, or None.
        schedule: the order of forward and backward passes.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        context: ParallelContext,
        loss: LossFunction,
        statistics: TokenStatistics | None = None,
        schedule: Schedule = non_pipeline,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.context = context
        self.loss = loss
        self.statistics = statistics
        self.schedule = schedule
        self.phase = "idle"
        """What the engine is doing, for the message when it fails."""

    def train_step(self, batch: Batch, lr: float, beta2: float | None = None) -> EngineResult:
        """One optimizer step on this rank's share of a global batch. Collective over all ranks.

        Args:
            batch: this data rank's micro batches, as many as on every other data rank.
            lr: learning rate of this step.
            beta2: second AdamW coefficient of this step; None keeps the one before.
        """
        started = time.perf_counter()
        self.model.train()
        self.optimizer.begin_step(len(batch.micro_batches))
        loss_scale = self.optimizer.loss_scale.clone()
        num_valid_tokens = self.sum_over_data(self._scalar(batch.num_valid_tokens))
        factor = loss_scale / num_valid_tokens.clamp(min=1.0)
        loss_sum = self._scalar(0.0)

        def forward(number: int) -> Tensor:
            self.phase = f"forward of micro batch {number}"
            output = self._forward(batch.micro_batches[number], self.statistics)
            loss_sum.add_(output.loss_sum.detach())
            self.phase = f"backward of micro batch {number}"
            return output.loss_sum * factor

        actions = self.schedule(1, len(batch.micro_batches), 1, 0)
        execute(actions, forward, lambda: None)
        backward_done = time.perf_counter()

        self.phase = "optimizer step"
        result = self.optimizer.step(lr, beta2)
        self.phase = "metrics"
        loss = self.sum_over_data(loss_sum) / num_valid_tokens.clamp(min=1.0)
        statistics = self.statistics.result(self.sum_over_data) if self.statistics else {}
        self.phase = "idle"
        return EngineResult(
            loss=loss,
            grad_norm=result.grad_norm,
            skipped=result.skipped,
            loss_scale=loss_scale,
            num_valid_tokens=num_valid_tokens,
            statistics=statistics,
            seconds={
                "forward_backward": backward_done - started,
                "optimizer": time.perf_counter() - backward_done,
            },
        )

    @torch.no_grad()
    def evaluate(self, micro_batch: MicroBatch, sink: TokenSink) -> None:
        """Forward of one micro batch without gradients, its token losses taken into `sink`."""
        self.phase = "evaluation"
        self.model.eval()
        self._forward(micro_batch, sink)
        self.phase = "idle"

    def _forward(self, micro_batch: MicroBatch, sink: TokenSink | None) -> LossOutput:
        micro = micro_batch.to(self.context.device)
        segments = None
        if micro.lengths is not None:
            assert micro.cu_seqlens is not None
            segments = Segments(micro.cu_seqlens, micro.lengths, max(micro.lengths))
        hidden = self.model(micro.input_ids, micro.position_ids, segments)
        # The head is read here and not called, so no hook of its own waits for its weights.
        self.optimizer.finish_gathering()
        output = self.loss(hidden.flatten(0, 1), self.model.head_weight(), micro.labels.flatten())  # type: ignore[operator]
        if sink is not None:
            assert output.correct is not None
            sink.update(output.token_losses, output.correct, micro.labels, micro.type_ids)
        return output

    def _scalar(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float32, device=self.context.device)

    def sum_over_data(self, tensor: Tensor) -> Tensor:
        """Sum a tensor in place over all data ranks and return it."""
        return all_reduce(tensor, self.context.group("data"))
