"""Executes the actions of one pipeline rank. Knows no schedule by name, no model and no optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from internlm.core.communication.p2p import Channel, PipelineChannels
from internlm.core.communication.pending import Pending
from internlm.core.parallel.linear.weight_gradients import WeightGradients
from internlm.core.progress.record import Progress
from internlm.core.scheduler.actions import Action, ActionKind
from internlm.core.scheduler.schedules import PipelineSchedule
from internlm.core.scheduler.stage_placement import Place

ACTIVATION, GRADIENT = "activation", "gradient"


Forward = Callable[[int, int, Tensor | None], Tensor]
"""(micro-batch, chunk, input of the chunk; None for the first stage) -> output of the chunk; for the last stage, the
scalar to differentiate. Inputs and outputs are residual streams `[B, S', h]`."""


class Executor:
    """Executes schedules on one rank of a pipeline.

    Args:
        rank: index along the pipeline axis.
        weight_gradients: holds weight gradients that are computed later.
        channels: to the other ranks; None for a pipeline of one rank.
        progress: records each action.
    """

    def __init__(
        self,
        rank: int,
        weight_gradients: WeightGradients,
        channels: PipelineChannels | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.rank = rank
        self.weight_gradients = weight_gradients
        self.channels = channels
        self.progress = progress or Progress()

    def run(self, schedule: PipelineSchedule, forward: Forward, new_activation: Callable[[int], Tensor]) -> None:
        """Execute this rank's actions in order. Under `torch.no_grad` the schedule must contain no backward action.

        Args:
            schedule: with communication; see `with_communication`.
            forward: see `Forward`.
            new_activation: micro-batch number -> uninitialized receive buffer for its residual stream.
        """
        step = _Step(self, schedule, forward, new_activation)
        for action in schedule.actions[self.rank]:
            step.do(action)
        if self.channels is not None:
            self.progress.mark("waiting for sends")
            self.channels.wait_for_sends()


class _Key(NamedTuple):
    """A tensor between two stages.

    Attributes:
        kind: ACTIVATION or GRADIENT.
        chunk: this rank's chunk that consumes the tensor (in `_Step.arriving`) or produced it (in `_Step.leaving`).
        micro_batch: its number within the step.
    """

    kind: str
    chunk: int
    micro_batch: int


class _SavedForward(NamedTuple):
    """What the backward pass of a chunk needs. It does not keep the output tensor alive.

    Attributes:
        received: input of the chunk; None for the first stage.
        output: edge of the autograd graph at the output; None if the output needs no gradient, because all weights
            before it are frozen.
    """

    received: Tensor | None
    output: GradientEdge | None


class _Step:
    """The tensors of one run of a schedule. Each is released as soon as its last use is queued."""

    def __init__(
        self,
        executor: Executor,
        schedule: PipelineSchedule,
        forward: Forward,
        new_activation: Callable[[int], Tensor],
    ) -> None:
        self.executor = executor
        self.rank = executor.rank
        self.placement = schedule.placement
        self.forward = forward
        self.new_activation = new_activation
        # The limit on unfinished sends of a channel. A rank that has sent n activations has run n forward passes. If n
        # exceeds what any rank has in flight, the gradient of one has come back, so the receiver has posted the receive
        # of that activation and of all before it. The same holds for gradients: a rank that sends n of them has got n
        # activations, and if their sender cannot have n in flight, it has posted the receive of a gradient.
        self.max_in_flight = schedule.max_in_flight
        self.arriving: dict[_Key, Pending] = {}
        self.leaving: dict[_Key, Tensor] = {}
        self.saved: dict[tuple[int, int], _SavedForward] = {}

    def do(self, action: Action) -> None:
        """Execute one action."""
        match action.kind:
            case ActionKind.FORWARD:
                self._forward(action)
            case ActionKind.BACKWARD:
                self._backward(action)
            case ActionKind.BACKWARD_INPUT:
                with self.executor.weight_gradients.postpone((action.chunk, action.micro_batch)):
                    self._backward(action)
            case ActionKind.BACKWARD_WEIGHT:
                self._mark("weight gradients", action)
                with torch.no_grad():
                    self.executor.weight_gradients.run((action.chunk, action.micro_batch))
            case ActionKind.SEND_ACTIVATION:
                self._send(ACTIVATION, action, self.placement.after(self.rank, action.chunk))
            case ActionKind.SEND_GRADIENT:
                self._send(GRADIENT, action, self.placement.before(self.rank, action.chunk))
            case ActionKind.RECV_ACTIVATION:
                self._receive(ACTIVATION, action, self.placement.before(self.rank, action.chunk))
            case ActionKind.RECV_GRADIENT:
                self._receive(GRADIENT, action, self.placement.after(self.rank, action.chunk))

    # -- computation ----------------------------------------------------------------------------------------------

    def _forward(self, action: Action) -> None:
        received = None
        if self.placement.before(self.rank, action.chunk) is not None:
            received = self._take(ACTIVATION, action).requires_grad_(torch.is_grad_enabled())
        self._mark("forward", action)
        output = self.forward(action.micro_batch, action.chunk, received)
        if torch.is_grad_enabled():
            # In some versions of torch, the edge of a Python autograd function does not keep its graph alive; the edge
            # of a view does, and saves only the shape of the output.
            edge = get_gradient_edge(output.view_as(output)) if output.requires_grad else None
            self.saved[action.chunk, action.micro_batch] = _SavedForward(received, edge)
        self._pass_on(ACTIVATION, action, self.placement.after(self.rank, action.chunk), output.detach())

    def _backward(self, action: Action) -> None:
        gradient = None
        if self.placement.after(self.rank, action.chunk) is not None:
            gradient = self._take(GRADIENT, action)
        self._mark("backward", action)
        received, output = self.saved.pop((action.chunk, action.micro_batch))
        if output is not None:
            torch.autograd.backward(output, gradient)
        if received is not None:
            assert received.grad is not None
            self._pass_on(GRADIENT, action, self.placement.before(self.rank, action.chunk), received.grad)

    # -- tensors between stages -----------------------------------------------------------------------------------

    def _pass_on(self, kind: str, action: Action, to: Place | None, tensor: Tensor) -> None:
        """Store a result until it is sent, or until another chunk of this rank uses it."""
        if to is None:
            return
        if to.rank == self.rank:
            self.arriving[_Key(kind, to.chunk, action.micro_batch)] = Pending(tensor)
        else:
            self.leaving[_Key(kind, action.chunk, action.micro_batch)] = tensor.contiguous()

    def _take(self, kind: str, action: Action) -> Tensor:
        self._mark(f"receive {kind}", action)
        return self.arriving.pop(_Key(kind, action.chunk, action.micro_batch)).wait()

    def _send(self, kind: str, action: Action, to: Place | None) -> None:
        self._mark(f"send {kind}", action)
        assert to is not None and self.executor.channels is not None
        tensor = self.leaving.pop(_Key(kind, action.chunk, action.micro_batch))
        self.executor.channels.send(Channel(self.rank, to.rank, kind), tensor, self.max_in_flight)

    def _receive(self, kind: str, action: Action, source: Place | None) -> None:
        self._mark(f"receive {kind}", action)
        assert source is not None and self.executor.channels is not None
        buffer = self.new_activation(action.micro_batch)
        incoming = self.executor.channels.receive(Channel(source.rank, self.rank, kind), buffer)
        self.arriving[_Key(kind, action.chunk, action.micro_batch)] = incoming

    def _mark(self, what: str, action: Action) -> None:
        chunk = f", chunk {action.chunk}" if self.placement.num_chunks > 1 else ""
        self.executor.progress.mark(f"{what} of micro-batch {action.micro_batch}{chunk}")
