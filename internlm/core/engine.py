"""One optimization step: forward and backward of a global batch, update of the weights, metrics.

The engine knows optimizer, loss and statistics by the protocols below. It knows nothing of configs, files or logging,
nor of where batches come from.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from internlm.core.communication.collectives import all_reduce
from internlm.core.communication.p2p import PipelineChannels
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.multi_token_loss import MultiTokenLoss
from internlm.core.optimizer_protocol import HyperParameters, Optimizer
from internlm.core.parallel.context.split_batch import SplitSample
from internlm.core.parallel.model_parallel import parallel_of
from internlm.core.parallel.pipeline_stages import PipelineModel
from internlm.core.progress.record import Progress
from internlm.core.routing_statistics import RoutingStatistics
from internlm.core.scheduler.communication import channels_of, with_communication
from internlm.core.scheduler.executor import Executor
from internlm.core.scheduler.schedules import PipelineSchedule, forward_only, make_schedule
from internlm.data.batch import Batch, LaterTokens, MicroBatch
from internlm.data.upload import Uploader
from internlm.model.moe.balance import BiasRule
from internlm.model.moe.router import RouterLosses
from internlm.model.ops.cross_entropy import LossFunction


class TokenSink(Protocol):
    """Accumulates per-token losses; implemented by `internlm.core.token_statistics.TokenSums`."""

    def update(self, token_losses: Tensor, correct: Tensor, labels: Tensor, type_ids: Tensor) -> None:
        """Add the tokens of one micro-batch."""


class TokenStatistics(TokenSink, Protocol):
    """Accumulates the metrics of a training step; implemented by `internlm.core.token_statistics.TypeMetrics`."""

    def result(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Scalar metrics over all tokens since the last call; collective, the same on all ranks."""


@dataclass
class ForwardBackwardResult:
    """Result of the passes of one step; an argument of `Engine.optimizer_step`.

    Attributes:
        loss_sum: scalar fp32, sum of the losses of this rank's tokens (not yet summed over ranks).
        loss_scale: scalar fp32, the factor on the loss in backward.
        num_valid_tokens: scalar fp32, of the global batch.
        seconds: host time of the passes.
    """

    loss_sum: Tensor
    loss_scale: Tensor
    num_valid_tokens: Tensor
    seconds: float


@dataclass
class EngineResult:
    """Result of one step. Tensors are scalars on the device, the same on every rank.

    Attributes:
        loss: fp32, cross entropy, mean over the valid tokens of the global batch; without the losses of routers and of
            later tokens.
        grad_norm: fp32, global L2 norm before clipping, loss scale removed.
        skipped: fp32, 1.0 when the update was skipped.
        loss_scale: fp32, the scale of this step.
        num_valid_tokens: fp32, number of tokens of the global batch that have a label.
        statistics: the metrics of `TokenStatistics`, and those of `RoutingStatistics` and `MultiTokenLoss`.
        seconds: host time by phase: "forward_backward" and "optimizer".
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

    The loss is the mean over all valid tokens of the global batch, independent of the number of ranks and
    micro-batches. A batch without a valid token gives loss 0 and zero gradients.

    Args:
        model: the result of `parallelize`. `model(input_ids, position_ids, varlen)` returns hidden states `[B, S, h]`,
            and `model.head_weight()` the output head `[V, h]`. In a pipeline, this rank's chunks from `build_stages`.
        optimizer: reduces the gradients and updates the weights.
        context: this rank's position and process groups.
        loss: sums the losses of tokens, such as `internlm.model.ops.cross_entropy.linear_cross_entropy`.
        statistics: accumulates metrics; None for none.
        schedule: number of micro-batches -> the actions of all pipeline ranks; called once with the number of ranks to
            find the placement of chunks. 1F1B by default, interleaved if a rank has several chunks.
        progress: records the phases of a step.
        router_losses: of a mixture of experts.
        bias_rule: how the selection biases of its routers change.
        seed: of the noise of its routers.
        multi_token_coeff: coefficient of the losses of layers that predict later tokens.

    Raises:
        ValueError: the number of ranks or chunks differs from that of the schedule.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        optimizer: Optimizer,
        context: ParallelContext,
        loss: LossFunction,
        statistics: TokenStatistics | None = None,
        schedule: Callable[[int], PipelineSchedule] | None = None,
        progress: Progress | None = None,
        router_losses: RouterLosses | None = None,
        bias_rule: BiasRule | None = None,
        seed: int = 0,
        multi_token_coeff: float = 0.0,
    ) -> None:
        self.chunks = [model] if isinstance(model, nn.Module) else list(model)
        self.optimizer = optimizer
        self.context = context
        self.loss = loss
        self.statistics = statistics
        self.progress = progress or Progress()
        self.parallel = parallel_of(self.chunks[0])
        self.routing = RoutingStatistics(
            self.chunks, context, router_losses or RouterLosses(), bias_rule or BiasRule(), seed
        )
        self.multi_token = MultiTokenLoss(self.chunks, context, multi_token_coeff)
        num_ranks, num_chunks = context.size("pipeline"), len(self.chunks)
        self._make_schedule = schedule or partial(make_schedule, "1F1B", num_ranks, num_chunks=num_chunks)
        self._schedules: dict[int, PipelineSchedule] = {}
        self._checked_inputs: set[tuple[type[nn.Module], str]] = set()
        probe = self._schedule(num_ranks)
        self.placement = probe.placement
        if (self.placement.num_ranks, self.placement.num_chunks) != (num_ranks, num_chunks):
            raise ValueError(
                f"the schedule is for {self.placement.num_ranks} pipeline ranks of {self.placement.num_chunks} chunks, "
                f"but there are {num_ranks} ranks and this one has {num_chunks} chunks"
            )
        rank = context.index("pipeline")
        self._has_first_stage = any(self.placement.stage_of(rank, chunk) == 0 for chunk in range(num_chunks))
        self._evaluation = with_communication(forward_only(self.placement))
        channels = PipelineChannels.create(context, channels_of(probe)) if num_ranks > 1 else None
        self._uploader = Uploader(context.device)
        self._executor = Executor(rank, self.parallel.weight_gradients, channels, self.progress)

    @property
    def model(self) -> nn.Module:
        """The model of a rank that has one chunk.

        Raises:
            ValueError: the rank has several chunks.
        """
        if len(self.chunks) > 1:
            raise ValueError(f"this rank has {len(self.chunks)} chunks of the model: see Engine.chunks")
        return self.chunks[0]

    def train_step(
        self,
        batch: Batch,
        hyper_parameters: HyperParameters | float | Callable[[], HyperParameters | float],
        *,
        before_optimizer_step: Callable[[], None] | None = None,
    ) -> EngineResult:
        """One optimizer step on this rank's share of a global batch: `forward_backward`, then `optimizer_step`.

        Collective over all ranks.

        Args:
            batch: this data rank's micro-batches, as many as on every other data rank.
            hyper_parameters: "lr" and others of this step; a number is the learning rate. A function is called after
                forward and backward are queued, so that a value which it reads from the device has had that time to
                arrive.
            before_optimizer_step: called between the two, on reduced gradients.
        """
        passes = self.forward_backward(batch)
        if before_optimizer_step is not None:
            self.optimizer.reduce_gradients()
            before_optimizer_step()
        return self.optimizer_step(passes, hyper_parameters)

    def forward_backward(self, batch: Batch) -> ForwardBackwardResult:
        """Forward and backward passes over all micro-batches of a global batch. Collective.

        Gradients accumulate over the micro-batches in the optimizer; those of an earlier call are discarded.

        Args:
            batch: this data rank's micro-batches, as many as on every other data rank.
        """
        started = time.perf_counter()
        for chunk in self.chunks:
            chunk.train()
        self.optimizer.begin_step(len(batch.micro_batches))
        loss_scale = self.optimizer.loss_scale.clone()
        self.progress.mark("counting the valid tokens of all ranks")
        # Ranks that share the tokens of a sample, and the stages of a pipeline, all count the same ones.
        num_valid_tokens = all_reduce(self._scalar(batch.num_valid_tokens), self.context.group("data"))
        factor = loss_scale / num_valid_tokens.clamp(min=1.0)
        loss_sum = self._scalar(0.0)
        self.routing.begin_step(len(batch.micro_batches), loss_scale, batch.sample_indices)
        self.multi_token.begin_step(batch, loss_scale)

        samples = [self._split(self.multi_token.add_later_tokens(micro)) for micro in batch.micro_batches]
        uploads = self._uploader.start([sample.micro_batch for sample in samples])

        def forward(number: int, chunk: int, received: Tensor | None) -> Tensor:
            micro = uploads[number].get()
            rows, width = batch.micro_batches[number].input_ids.shape
            self.routing.begin_micro_batch(number, (rows, width), samples[number].micro_batch.token_indices)
            is_last = self._is_last(chunk)
            later = micro.later if is_last else []
            hidden = self._forward(samples[number], micro, chunk, received, later)
            if not is_last:
                return hidden
            model = self.chunks[chunk]
            head = self._head_weight(model)
            states, *later_states = hidden.chunk(1 + len(later)) if later else [hidden]
            loss = self._loss(model, head, states, micro, self.statistics)
            loss_sum.add_(loss.detach())
            if not later:
                return loss * factor
            return loss * factor + self.multi_token.loss(model, head, later_states, later, micro, self.loss)

        self._executor.run(
            self._schedule(len(batch.micro_batches)),
            forward,
            lambda number: self._new_activation(samples[number].micro_batch),
        )
        self.progress.mark("last weight gradients")
        with torch.no_grad():
            for chunk in self.chunks:
                parallel_of(chunk).end_backward()
        self.parallel.weight_gradients.check_empty()
        return ForwardBackwardResult(loss_sum, loss_scale, num_valid_tokens, time.perf_counter() - started)

    def optimizer_step(
        self,
        passes: ForwardBackwardResult,
        hyper_parameters: HyperParameters | float | Callable[[], HyperParameters | float],
    ) -> EngineResult:
        """Reduce and clip the gradients of `passes`, update the weights, and sum up the metrics. Collective.

        Args:
            passes: the result of `forward_backward` in this step.
            hyper_parameters: see `train_step`.
        """
        started = time.perf_counter()
        self.progress.mark("optimizer step")
        result = self.optimizer.step(hyper_parameters() if callable(hyper_parameters) else hyper_parameters)
        self.progress.mark("metrics")
        loss = self.sum_over_tokens(passes.loss_sum) / passes.num_valid_tokens.clamp(min=1.0)
        statistics = self.statistics.result(self.sum_over_tokens) if self.statistics else {}
        statistics |= self.routing.finish_step(result.skipped) | self.multi_token.result(self.sum_over_tokens)
        return EngineResult(
            loss=loss,
            grad_norm=result.grad_norm,
            skipped=result.skipped,
            loss_scale=passes.loss_scale,
            num_valid_tokens=passes.num_valid_tokens,
            statistics=statistics,
            seconds={"forward_backward": passes.seconds, "optimizer": time.perf_counter() - started},
        )

    @torch.no_grad()
    def evaluate(self, micro_batch: MicroBatch, sink: TokenSink, loss: LossFunction | None = None) -> None:
        """Run the forward pass of one micro-batch without gradients and add its tokens to `sink`.

        Collective over the ranks of a pipeline, all with the same micro-batch. Only the last stage computes token
        losses: reduce the sinks of all ranks with `sum_over_tokens`. Layers that predict later tokens are left out.

        Args:
            micro_batch: the tokens.
            sink: gets the losses.
            loss: of the tokens; None: that of training.
        """
        for chunk in self.chunks:
            chunk.eval()
        sample = self._split(micro_batch)
        upload = self._uploader.start([sample.micro_batch])[0]

        def forward(_: int, chunk: int, received: Tensor | None) -> Tensor:
            micro, model = upload.get(), self.chunks[chunk]
            hidden = self._forward(sample, micro, chunk, received)
            if not self._is_last(chunk):
                return hidden
            return self._loss(model, self._head_weight(model), hidden, micro, sink, loss)

        self._executor.run(self._evaluation, forward, lambda _: self._new_activation(sample.micro_batch))

    def _schedule(self, num_micro_batches: int) -> PipelineSchedule:
        if num_micro_batches not in self._schedules:
            self._schedules[num_micro_batches] = with_communication(self._make_schedule(num_micro_batches))
        return self._schedules[num_micro_batches]

    def _is_last(self, chunk: int) -> bool:
        return self.placement.after(self._executor.rank, chunk) is None

    def _split(self, micro: MicroBatch) -> SplitSample:
        """This rank's part of a micro-batch on the host, pinned if the micro-batch is."""
        sample = self.parallel.split_sample(micro)
        if micro.images is not None:
            images = self.parallel.own_images(micro.images) if self._has_first_stage else None
            sample = sample._replace(micro_batch=replace(sample.micro_batch, images=images))
        if not micro.input_ids.is_pinned():
            return sample
        return sample._replace(micro_batch=sample.micro_batch.pinned())

    def _forward(
        self,
        sample: SplitSample,
        micro: MicroBatch,
        chunk: int,
        received: Tensor | None,
        later: Sequence[LaterTokens] = (),
    ) -> Tensor:
        """The residual stream after a chunk, or the hidden states after the last one. `micro` is on the device."""
        varlen = sample.documents(micro)
        model = self.chunks[chunk]
        inputs = micro.input_ids if received is None else received
        options: dict[str, Any] = {}
        if micro.extra:
            self._check_takes(model, "extra", f"extra inputs ({', '.join(micro.extra)})")
            own_tokens = parallel_of(model).own_tokens
            options["extra"] = {name: own_tokens(values) for name, values in micro.extra.items()}
        if micro.images is not None and received is None:
            self._check_takes(model, "images", "pictures")
            options["images"] = micro.images
        if later:
            options["later_ids"] = torch.cat([tokens.input_ids for tokens in later])
        with self.routing.forward_pass(chunk, micro):
            hidden: Tensor = model(inputs, micro.position_ids, varlen, **options)
        return hidden

    def _head_weight(self, model: nn.Module) -> Tensor:
        """The weight of the output head as losses use it."""
        # It is read without calling the module, so no forward hook waits for the all-gather.
        self.optimizer.finish_gathering()
        return parallel_of(model).head_weight(model)

    def _loss(
        self,
        model: nn.Module,
        head: Tensor,
        hidden: Tensor,
        micro: MicroBatch,
        sink: TokenSink | None,
        loss: LossFunction | None = None,
    ) -> Tensor:
        """The loss sum of this rank's tokens; `sink` gets the loss of each."""
        parallel = parallel_of(model)
        output, labels, type_ids = parallel.head_loss(
            model, hidden, micro.labels, micro.type_ids, loss or self.loss, weight=head
        )
        if sink is not None:
            assert output.correct is not None
            sink.update(output.token_losses, output.correct, labels, type_ids)
        return output.loss_sum

    def _check_takes(self, model: nn.Module, name: str, content: str) -> None:
        """Refuse a batch with inputs that the forward method of the model does not take."""
        if (type(model), name) not in self._checked_inputs:
            parameters = inspect.signature(model.forward).parameters
            if name not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                raise ValueError(
                    f"the batch has {content}, which the model does not take: give {type(model).__name__}.forward a "
                    f"parameter `{name}`"
                )
            self._checked_inputs.add((type(model), name))

    def _new_activation(self, micro_batch: MicroBatch) -> Tensor:
        """An empty receive buffer for the residual stream of a micro-batch between two stages."""
        rows, num_tokens = micro_batch.input_ids.shape
        model = cast(PipelineModel, self.chunks[0])
        shape = rows, self.parallel.sequence_length(num_tokens), model.residual_size
        return torch.empty(shape, dtype=model.residual_dtype, device=self.context.device)

    def _scalar(self, value: float) -> Tensor:
        # A fill on the device; `torch.tensor` would copy from the host and wait for the copy.
        return torch.full((), value, dtype=torch.float32, device=self.context.device)

    def sum_over_tokens(self, tensor: Tensor) -> Tensor:
        """All-reduce a tensor in place over all ranks that compute the loss of different tokens; returns it.

        Pipeline ranks without the last stage contribute zeros.
        """
        for axis in (*self.parallel.token_axes, "pipeline"):
            all_reduce(tensor, self.context.group(axis))
        return tensor
