"""Runs a schedule in virtual time, without processes: proves that it ends, and shows what it costs."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from internlm.core.scheduler.actions import COMPUTE, RECEIVES, Action, ActionKind
from internlm.core.scheduler.schedules import PipelineSchedule
from internlm.core.scheduler.timeline import Event, Timeline


class ScheduleError(Exception):
    """A schedule that would not compute a step: a defect of the schedule, not of what the user asked for."""


@dataclass(frozen=True)
class Costs:
    """Time that one action takes on one chunk, in any unit; all chunks are alike.

    Attributes:
        forward, backward_input, backward_weight: of these actions; a whole backward takes both of its parts.
        transfer: of a tensor from one rank to another, beside the computation.
    """

    forward: float = 1
    backward_input: float = 1
    backward_weight: float = 1
    transfer: float = 0

    def of(self, kind: ActionKind) -> float:
        """The time of a compute action."""
        return {
            ActionKind.FORWARD: self.forward,
            ActionKind.BACKWARD: self.backward_input + self.backward_weight,
            ActionKind.BACKWARD_INPUT: self.backward_input,
            ActionKind.BACKWARD_WEIGHT: self.backward_weight,
        }[kind]


def simulate(schedule: PipelineSchedule, costs: Costs | None = None) -> Timeline:
    """Run a step as its ranks would: each does its actions in order, and waits for the tensors that it uses.

    With communication in the lists, a tensor leaves when it is sent and its receive is posted, one after the other on
    each channel; a rank never waits in a send or in a post. Without, a tensor leaves as soon as it is made.

    Raises:
        ScheduleError: an action is missing or there twice, a receive meets the send of another tensor, or no rank can
            go on; the message names the actions.
    """
    _check_complete(schedule)
    return _Simulation(schedule, costs or Costs()).run()


def _check_complete(schedule: PipelineSchedule) -> None:
    """Each forward is there once, and each backward once: whole, or as input and weight."""
    kinds = [kind for kind in ActionKind if kind in COMPUTE]
    for rank, actions in enumerate(schedule.actions):
        counts = Counter(action for action in actions if action.kind in COMPUTE)
        for micro_batch in range(schedule.num_micro_batches):
            for chunk in range(schedule.placement.num_chunks):
                found = [counts.pop(Action(kind, micro_batch, chunk), 0) for kind in kinds]
                if found not in ([1, 1, 0, 0], [1, 0, 1, 1]):
                    raise ScheduleError(
                        f"{schedule.name}: rank {rank} does F, B, I, W {found} times for micro batch {micro_batch} in "
                        f"chunk {chunk}; expected [1, 1, 0, 0] or [1, 0, 1, 1]"
                    )
        if counts:
            raise ScheduleError(f"{schedule.name}: rank {rank} has no chunk for {', '.join(map(str, counts))}")


class _Tensor(NamedTuple):
    """What travels between stages: the output of a stage, or the gradient of its input."""

    is_gradient: bool
    stage: int
    micro_batch: int


@dataclass
class _Channel:
    """From one rank to another, activations or gradients: tensors and times of the sends and receives to come."""

    sent: deque[tuple[_Tensor, float]] = field(default_factory=deque)
    posted: deque[tuple[_Tensor, float]] = field(default_factory=deque)
    free_at: float = 0


class _Simulation:
    """How far each rank is, and which tensor is where."""

    def __init__(self, schedule: PipelineSchedule, costs: Costs) -> None:
        self.schedule = schedule
        self.placement = schedule.placement
        self.costs = costs
        self.has_communication = any(action.kind not in COMPUTE for row in schedule.actions for action in row)
        self.position = [0] * self.placement.num_ranks
        self.clock = [0.0] * self.placement.num_ranks
        self.events: list[list[Event]] = [[] for _ in schedule.actions]
        self.made: dict[_Tensor, float] = {}
        self.arrived: dict[_Tensor, float] = {}
        self.channels: defaultdict[tuple[int, int, bool], _Channel] = defaultdict(_Channel)

    def run(self) -> Timeline:
        # Times follow from the lists alone, so it does not matter which rank goes on first.
        while sum(self._advance(rank) for rank in range(self.placement.num_ranks)):
            pass
        self._check_finished()
        return Timeline(self.schedule, tuple(tuple(row) for row in self.events))

    def _advance(self, rank: int) -> int:
        """Do a rank's actions up to the first that must wait; how many were done."""
        actions = self.schedule.actions[rank]
        first = self.position[rank]
        while self.position[rank] < len(actions):
            action = actions[self.position[rank]]
            done = self._compute(rank, action) if action.kind in COMPUTE else self._communicate(rank, action)
            if not done:
                break
            self.position[rank] += 1
        return self.position[rank] - first

    def _compute(self, rank: int, action: Action) -> bool:
        start = self.clock[rank]
        for tensor in self._used(rank, action):
            available = self._available(rank, tensor)
            if available is None:
                return False
            start = max(start, available)
        self.clock[rank] = start + self.costs.of(action.kind)
        self.events[rank].append(Event(start, self.clock[rank], action))
        if action.kind is not ActionKind.BACKWARD_WEIGHT:
            self.made[self._tensor(rank, action)] = self.clock[rank]
        return True

    def _used(self, rank: int, action: Action) -> Iterator[_Tensor]:
        """The tensors without which a compute action cannot start."""
        stage, micro_batch = self.placement.stage_of(rank, action.chunk), action.micro_batch
        if action.kind is ActionKind.FORWARD:
            if stage > 0:
                yield _Tensor(False, stage - 1, micro_batch)
        elif action.kind is ActionKind.BACKWARD_WEIGHT:
            yield _Tensor(True, stage, micro_batch)
        else:
            yield _Tensor(False, stage, micro_batch)
            if stage < self.placement.num_stages - 1:
                yield _Tensor(True, stage + 1, micro_batch)

    def _available(self, rank: int, tensor: _Tensor) -> float | None:
        """When a tensor can be used on a rank; None while that is not known."""
        if self.placement.place_of(tensor.stage).rank == rank:
            return self.made.get(tensor)
        if self.has_communication:
            return self.arrived.get(tensor)
        return self.made[tensor] + self.costs.transfer if tensor in self.made else None

    def _tensor(self, rank: int, action: Action) -> _Tensor:
        """What an action makes, sends or receives."""
        stage = self.placement.stage_of(rank, action.chunk)
        if action.kind is ActionKind.RECV_ACTIVATION:
            return _Tensor(False, stage - 1, action.micro_batch)
        if action.kind is ActionKind.RECV_GRADIENT:
            return _Tensor(True, stage + 1, action.micro_batch)
        is_gradient = action.kind not in (ActionKind.FORWARD, ActionKind.SEND_ACTIVATION)
        return _Tensor(is_gradient, stage, action.micro_batch)

    def _communicate(self, rank: int, action: Action) -> bool:
        tensor = self._tensor(rank, action)
        sender = self.placement.place_of(tensor.stage).rank
        receiver = self.placement.place_of(tensor.stage + (-1 if tensor.is_gradient else 1)).rank
        channel = self.channels[sender, receiver, tensor.is_gradient]
        if action.kind in RECEIVES:
            channel.posted.append((tensor, self.clock[rank]))
        elif tensor in self.made:
            channel.sent.append((tensor, self.clock[rank]))
        else:
            return False
        if channel.sent and channel.posted:
            (sent, sent_at), (posted, posted_at) = channel.sent.popleft(), channel.posted.popleft()
            if sent != posted:
                raise ScheduleError(f"{self.schedule.name}: rank {receiver} posts {posted}, rank {sender} sends {sent}")
            channel.free_at = max(channel.free_at, sent_at, posted_at) + self.costs.transfer
            self.arrived[sent] = channel.free_at
        return True

    def _check_finished(self) -> None:
        stuck = [
            f"rank {rank} waits at action {position}, {actions[position]}"
            for rank, (position, actions) in enumerate(zip(self.position, self.schedule.actions, strict=True))
            if position < len(actions)
        ]
        if stuck:
            raise ScheduleError(f"{self.schedule.name}: no rank can go on; {'; '.join(stuck)}")
        for (sender, receiver, _), channel in self.channels.items():
            left = [tensor for tensor, _ in (*channel.sent, *channel.posted)]
            if left:
                raise ScheduleError(
                    f"{self.schedule.name}: between rank {sender} and {receiver} one side only has {left}"
                )
