"""Simulates a schedule in virtual time, without processes: proves that it terminates, and yields its timeline."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from internlm.core.scheduler.actions import COMPUTE, RECEIVES, Action, ActionKind
from internlm.core.scheduler.schedules import PipelineSchedule
from internlm.core.scheduler.timeline import Event, Timeline


class ScheduleError(Exception):
    """An incorrect schedule. This is a bug in the schedule, never a user error."""


@dataclass(frozen=True)
class Costs:
    """Duration of one action on one chunk, in any unit; equal for all chunks.

    Attributes:
        forward, backward_input, backward_weight: of these actions; a full backward takes the sum of its two parts.
        transfer: of a tensor from one rank to another; overlaps computation.
    """

    forward: float = 1
    backward_input: float = 1
    backward_weight: float = 1
    transfer: float = 0

    def of(self, kind: ActionKind) -> float:
        """The duration of a compute action."""
        return {
            ActionKind.FORWARD: self.forward,
            ActionKind.BACKWARD: self.backward_input + self.backward_weight,
            ActionKind.BACKWARD_INPUT: self.backward_input,
            ActionKind.BACKWARD_WEIGHT: self.backward_weight,
        }[kind]


def simulate(schedule: PipelineSchedule, costs: Costs | None = None) -> Timeline:
    """Simulate a step: each rank executes its actions in order, and waits for the tensors that they use.

    If the schedule contains communication, a transfer starts when the send and the receive are both posted; the
    transfers of a channel run one after another, and posting never blocks. Otherwise a transfer starts as soon as the
    tensor is produced.

    Raises:
        ScheduleError: an action is missing or duplicated, a receive is matched with the send of another tensor, or all
            remaining ranks wait (deadlock); the message names the actions.
    """
    _check_complete(schedule)
    return _Simulation(schedule, costs or Costs()).run()


def _check_complete(schedule: PipelineSchedule) -> None:
    """Check that each forward occurs once, and each backward once: in full, or as its two parts."""
    kinds = [kind for kind in ActionKind if kind in COMPUTE]
    for rank, actions in enumerate(schedule.actions):
        counts = Counter(action for action in actions if action.kind in COMPUTE)
        for micro_batch in range(schedule.num_micro_batches):
            for chunk in range(schedule.placement.num_chunks):
                found = [counts.pop(Action(kind, micro_batch, chunk), 0) for kind in kinds]
                if found not in ([1, 1, 0, 0], [1, 0, 1, 1]):
                    raise ScheduleError(
                        f"{schedule.name}: rank {rank} has F, B, I, W {found} times for micro-batch {micro_batch}, "
                        f"chunk {chunk}; expected [1, 1, 0, 0] or [1, 0, 1, 1]"
                    )
        if counts:
            raise ScheduleError(f"{schedule.name}: rank {rank} has no chunk for {', '.join(map(str, counts))}")


class _Tensor(NamedTuple):
    """A tensor between stages: the output of a stage, or the gradient of its input."""

    is_gradient: bool
    stage: int
    micro_batch: int


@dataclass
class _Channel:
    """A channel from one rank to another: unmatched sends and receives, as (tensor, time of the post)."""

    sent: deque[tuple[_Tensor, float]] = field(default_factory=deque)
    posted: deque[tuple[_Tensor, float]] = field(default_factory=deque)
    free_at: float = 0


class _Simulation:
    """The state of a simulation.

    Attributes:
        position: by rank, number of executed actions.
        clock: by rank, time at the end of the last action.
        produced: time at which each tensor was computed.
        arrived: time at which each tensor had been transferred.
    """

    def __init__(self, schedule: PipelineSchedule, costs: Costs) -> None:
        self.schedule = schedule
        self.placement = schedule.placement
        self.costs = costs
        self.has_communication = any(action.kind not in COMPUTE for row in schedule.actions for action in row)
        self.position = [0] * self.placement.num_ranks
        self.clock = [0.0] * self.placement.num_ranks
        self.events: list[list[Event]] = [[] for _ in schedule.actions]
        self.produced: dict[_Tensor, float] = {}
        self.arrived: dict[_Tensor, float] = {}
        self.channels: defaultdict[tuple[int, int, bool], _Channel] = defaultdict(_Channel)

    def run(self) -> Timeline:
        # Times depend on the lists only, not on the order in which ranks advance.
        while sum(self._advance(rank) for rank in range(self.placement.num_ranks)):
            pass
        self._check_finished()
        return Timeline(self.schedule, tuple(tuple(row) for row in self.events))

    def _advance(self, rank: int) -> int:
        """Execute a rank's actions up to the first that must wait; returns their number."""
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
            self.produced[self._tensor(rank, action)] = self.clock[rank]
        return True

    def _used(self, rank: int, action: Action) -> Iterator[_Tensor]:
        """The tensors that a compute action uses."""
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
        """Time from which a tensor can be used on a rank; None while it is unknown."""
        if self.placement.place_of(tensor.stage).rank == rank:
            return self.produced.get(tensor)
        if self.has_communication:
            return self.arrived.get(tensor)
        return self.produced[tensor] + self.costs.transfer if tensor in self.produced else None

    def _tensor(self, rank: int, action: Action) -> _Tensor:
        """The tensor that an action produces, sends or receives."""
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
        elif tensor in self.produced:
            channel.sent.append((tensor, self.clock[rank]))
        else:
            return False
        if channel.sent and channel.posted:
            (sent, sent_at), (posted, posted_at) = channel.sent.popleft(), channel.posted.popleft()
            if sent != posted:
                raise ScheduleError(
                    f"{self.schedule.name}: rank {receiver} receives {posted}, but rank {sender} sends {sent}"
                )
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
            raise ScheduleError(f"{self.schedule.name}: deadlock; {'; '.join(stuck)}")
        for (sender, receiver, _), channel in self.channels.items():
            unmatched = [tensor for tensor, _ in (*channel.sent, *channel.posted)]
            if unmatched:
                raise ScheduleError(
                    f"{self.schedule.name}: only one of ranks {sender} and {receiver} sends or receives {unmatched}"
                )
