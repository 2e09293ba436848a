"""Inserts sends and receives into a schedule. Pure functions; the executor performs the communication."""

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
"""Number of actions between the post of a receive and the action that uses it, so that the transfer overlaps them."""


class Message(NamedTuple):
    """The transfer of one tensor: its channel, and the actions of sender and receiver."""

    channel: Channel
    send: Action
    receive: Action


def message_from(placement: Placement, rank: int, action: Action) -> Message | None:
    """The transfer that follows a compute action of `rank`; None if its result stays on the rank."""
    if action.kind is ActionKind.FORWARD:
        kind, to = "activation", placement.after(rank, action.chunk)
        send, receive = ActionKind.SEND_ACTIVATION, ActionKind.RECV_ACTIVATION
    elif action.kind in (ActionKind.BACKWARD, ActionKind.BACKWARD_INPUT):
        kind, to = "gradient", placement.before(rank, action.chunk)
        send, receive = ActionKind.SEND_GRADIENT, ActionKind.RECV_GRADIENT
    else:
        return None
    # Between two chunks of one rank, as at the turn of a V, nothing is sent.
    if to is None or to.rank == rank:
        return None
    micro_batch = action.micro_batch
    return Message(
        Channel(rank, to.rank, kind), Action(send, micro_batch, action.chunk), Action(receive, micro_batch, to.chunk)
    )


def channels_of(schedule: PipelineSchedule) -> set[Channel]:
    """The channels that a schedule uses."""
    messages = (
        message_from(schedule.placement, rank, action)
        for rank, actions in enumerate(schedule.actions)
        for action in actions
    )
    return {message.channel for message in messages if message is not None}


def receive_before(action: Action) -> Action | None:
    """The receive whose tensor a compute action uses, if the tensor comes from another rank."""
    if action.kind is ActionKind.FORWARD:
        return Action(ActionKind.RECV_ACTIVATION, action.micro_batch, action.chunk)
    if action.kind in (ActionKind.BACKWARD, ActionKind.BACKWARD_INPUT):
        return Action(ActionKind.RECV_GRADIENT, action.micro_batch, action.chunk)
    return None


def with_communication(schedule: PipelineSchedule) -> PipelineSchedule:
    """The schedule with its sends and receives.

    A send directly follows the action that produces the tensor. A receive is posted `AHEAD` actions before its use, or
    earlier: on each channel, receives are posted in the order of the sends, because tensors are untagged.
    """
    channels: dict[Channel, deque[Action]] = {}
    # By receiving rank: receive -> the queue of receives that are still to be posted on its channel.
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
    """The actions of one rank, with its sends and receives."""
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
