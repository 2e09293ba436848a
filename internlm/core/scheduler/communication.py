"""Puts the sends and receives into a schedule. Pure; the executor knows how tensors travel."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from internlm.core.communication.p2p import Channel
from internlm.core.scheduler.actions import Action, ActionKind
from internlm.core.scheduler.schedules import PipelineSchedule
from internlm.core.scheduler.stage_placement import Placement

AHEAD = 1
"""A receive is posted while this many actions still come before the one that uses it: the tensor travels meanwhile."""


class Message(NamedTuple):
    """One tensor on a channel: what its sender and its receiver do."""

    channel: Channel
    send: Action
    receive: Action


def message_from(placement: Placement, rank: int, action: Action) -> Message | None:
    """What `rank` must send when it has done a compute action; None when nothing leaves it."""
    if action.kind is ActionKind.FORWARD:
        carries, to = "activation", placement.after(rank, action.chunk)
        kinds = ActionKind.SEND_ACTIVATION, ActionKind.RECV_ACTIVATION
    elif action.kind in (ActionKind.BACKWARD, ActionKind.BACKWARD_INPUT):
        carries, to = "gradient", placement.before(rank, action.chunk)
        kinds = ActionKind.SEND_GRADIENT, ActionKind.RECV_GRADIENT
    else:
        return None
    # Between two chunks of one rank, as at the turn of a V, nothing travels.
    if to is None or to.rank == rank:
        return None
    send, receive = Action(kinds[0], action.micro_batch, action.chunk), Action(kinds[1], action.micro_batch, to.chunk)
    return Message(Channel(rank, to.rank, carries), send, receive)


def channels_of(schedule: PipelineSchedule) -> set[Channel]:
    """The channels that a schedule uses."""
    messages = (
        message_from(schedule.placement, rank, action)
        for rank, actions in enumerate(schedule.actions)
        for action in actions
    )
    return {message.channel for message in messages if message is not None}


def receive_before(action: Action) -> Action | None:
    """The receive whose tensor a compute action uses, where that comes from another rank."""
    if action.kind is ActionKind.FORWARD:
        return Action(ActionKind.RECV_ACTIVATION, action.micro_batch, action.chunk)
    if action.kind in (ActionKind.BACKWARD, ActionKind.BACKWARD_INPUT):
        return Action(ActionKind.RECV_GRADIENT, action.micro_batch, action.chunk)
    return None


def with_communication(schedule: PipelineSchedule) -> PipelineSchedule:
    """The schedule with its sends and receives.

    A send comes right after the action that makes the tensor. A receive is posted `AHEAD` actions before its use, or
    earlier: on each channel receives are posted in the order of the sends, as tensors of equal shape carry no name.
    """
    channels: dict[Channel, deque[Action]] = {}
    # By receiving rank: the channel of a receive, as the queue of what is still to be posted on it.
    queue_of: list[dict[Action, deque[Action]]] = [{} for _ in schedule.actions]
    for rank, actions in enumerate(schedule.actions):
        for action in actions:
            message = message_from(schedule.placement, rank, action)
            if message is not None:
                queue = channels.setdefault(message.channel, deque())
                queue.append(message.receive)
                queue_of[message.channel.receiver][message.receive] = queue
    lists = (tuple(_complete(schedule, rank, queue_of[rank])) for rank in range(len(schedule.actions)))
    return replace(schedule, actions=tuple(lists))


def _complete(schedule: PipelineSchedule, rank: int, queue_of: dict[Action, deque[Action]]) -> Iterator[Action]:
    """One rank's actions with its sends and receives."""
    actions = schedule.actions[rank]
    posted: set[Action] = set()
    for number, action in enumerate(actions):
        for upcoming in actions[number : number + AHEAD + 1]:
            needed = receive_before(upcoming)
            while needed in queue_of and needed not in posted:
                receive = queue_of[needed].popleft()
                posted.add(receive)
                yield receive
        yield action
        message = message_from(schedule.placement, rank, action)
        if message is not None:
            yield message.send
