"""Runs the list of actions of one rank of a pipeline. Knows no schedule by name, no model and no optimizer."""

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
"""(micro batch, chunk, the residual stream before the chunk, or None where the model begins) -> the residual stream
after it, or the scalar to differentiate where the model ends."""


class Executor:
    """One rank's part in a pipeline.

    Args:
        rank: of the pipeline.
        weight_gradients: where the chunks leave weight gradients for later.
        channels: to the other ranks; None when there is one.
        progress: where each action is marked.
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
        """Carry out this rank's actions in order. Without gradients (`torch.no_grad`) there must be no backward.

        Args:
            schedule: with communication.
            forward: see `Forward`.
            new_activation: micro-batch number -> uninitialised memory for its residual stream.
        """
        step = _Step(self, schedule, forward, new_activation)
        for action in schedule.actions[self.rank]:
            step.do(action)
        if self.channels is not None:
            self.progress.mark("waiting until all is sent")
            self.channels.wait_for_sends()


class _Key(NamedTuple):
    """A tensor between two stages, by the chunk that it enters (an activation) or comes back to (a gradient)."""

    carries: str
    chunk: int
    micro_batch: int


class _Alive(NamedTuple):
    """What a backward pass needs. The output itself is not among it: its memory is free once it was handed over."""

    received: Tensor | None
    output: GradientEdge | None
    """None where nothing before it is trained: the weights of a first stage may all be frozen."""


class _Step:
    """The tensors of one run of a schedule. Each is dropped as soon as its last use was asked for."""

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
        # A rank that sent n activations ran n forward passes. Where n is more than any rank keeps alive, the gradient
        # of one came back: so the receiver asked for that one, and on a channel for all before it. In the same way a
        # rank that sends n gradients got n activations, and if their sender cannot keep n alive, it asked for one.
        self.max_in_flight = schedule.max_alive
        self.arriving: dict[_Key, Pending] = {}
        self.leaving: dict[_Key, Tensor] = {}
        self.alive: dict[tuple[int, int], _Alive] = {}

    def do(self, action: Action) -> None:
        """Carry out one action."""
        match action.kind:
            case ActionKind.FORWARD:
                self._forward(action)
            case ActionKind.BACKWARD:
                self._backward(action)
            case ActionKind.BACKWARD_INPUT:
                with self.executor.weight_gradients.postpone((action.chunk, action.micro_batch)):
                    self._backward(action)
            case ActionKind.BACKWARD_WEIGHT:
                self._announce("weight gradients", action)
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

    # -- computing ------------------------------------------------------------------------------------------------

    def _forward(self, action: Action) -> None:
        received = None
        if self.placement.before(self.rank, action.chunk) is not None:
            received = self._take(ACTIVATION, action).requires_grad_(torch.is_grad_enabled())
        self._announce("forward", action)
        output = self.forward(action.micro_batch, action.chunk, received)
        if torch.is_grad_enabled():
            # The edge of an autograd function written in Python does not keep its graph alive in every version of
            # torch; that of a view does, and of the output only the shape is kept.
            edge = get_gradient_edge(output.view_as(output)) if output.requires_grad else None
            self.alive[action.chunk, action.micro_batch] = _Alive(received, edge)
        self._hand_over(ACTIVATION, action, self.placement.after(self.rank, action.chunk), output.detach())

    def _backward(self, action: Action) -> None:
        gradient = None
        if self.placement.after(self.rank, action.chunk) is not None:
            gradient = self._take(GRADIENT, action)
        self._announce("backward", action)
        received, output = self.alive.pop((action.chunk, action.micro_batch))
        if output is not None:
            torch.autograd.backward(output, gradient)
        if received is not None:
            assert received.grad is not None
            self._hand_over(GRADIENT, action, self.placement.before(self.rank, action.chunk), received.grad)

    # -- between the stages ---------------------------------------------------------------------------------------

    def _hand_over(self, carries: str, action: Action, to: Place | None, tensor: Tensor) -> None:
        """Keep a result until it is sent, or for another chunk of this rank."""
        if to is None:
            return
        if to.rank == self.rank:
            self.arriving[_Key(carries, to.chunk, action.micro_batch)] = Pending(tensor)
        else:
            self.leaving[_Key(carries, action.chunk, action.micro_batch)] = tensor.contiguous()

    def _take(self, carries: str, action: Action) -> Tensor:
        self._announce(f"receive {carries}", action)
        return self.arriving.pop(_Key(carries, action.chunk, action.micro_batch)).wait()

    def _send(self, carries: str, action: Action, to: Place | None) -> None:
        self._announce(f"send {carries}", action)
        assert to is not None and self.executor.channels is not None
        tensor = self.leaving.pop(_Key(carries, action.chunk, action.micro_batch))
        self.executor.channels.send(Channel(self.rank, to.rank, carries), tensor, self.max_in_flight)

    def _receive(self, carries: str, action: Action, source: Place | None) -> None:
        self._announce(f"receive {carries}", action)
        assert source is not None and self.executor.channels is not None
        buffer = self.new_activation(action.micro_batch)
        incoming = self.executor.channels.receive(Channel(source.rank, self.rank, carries), buffer)
        self.arriving[_Key(carries, action.chunk, action.micro_batch)] = incoming

    def _announce(self, what: str, action: Action) -> None:
        chunk = f", chunk {action.chunk}" if self.placement.num_chunks > 1 else ""
        self.executor.progress.mark(f"{what} of micro batch {action.micro_batch}{chunk}")
