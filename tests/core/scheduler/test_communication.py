"""Sends and receives: every tensor that crosses ranks travels once, in order, and none is late."""

from __future__ import annotations

from collections import defaultdict

import pytest

from internlm.core.scheduler.actions import COMPUTE, RECEIVES, Action, ActionKind
from internlm.core.scheduler.communication import message_from, receive_before, with_communication
from internlm.core.scheduler.schedules import make_schedule
from internlm.core.scheduler.simulator import Costs, simulate

FORMS = [("1F1B", 1), ("1F1B", 2), ("1F1B", 3), ("ZBH1", 1), ("ZBV", 2), ("DUALPIPEV", 2)]


def test_lists_of_two_ranks_by_hand() -> None:
    first, last = with_communication(make_schedule("1F1B", 2, 2)).actions
    assert ", ".join(map(str, first)) == (
        "F0, send activation 0, receive gradient 0, F1, send activation 1, receive gradient 1, B0, B1"
    )
    assert ", ".join(map(str, last)) == (
        "receive activation 0, F0, receive activation 1, B0, send gradient 0, F1, B1, send gradient 1"
    )


def test_nothing_travels_at_the_turn_of_a_v() -> None:
    schedule = make_schedule("ZBV", 2, 4, 2)
    assert message_from(schedule.placement, 1, Action(ActionKind.FORWARD, 0, 0)) is None
    message = message_from(schedule.placement, 1, Action(ActionKind.FORWARD, 0, 1))
    assert message is not None and (message.channel.sender, message.channel.receiver) == (1, 0)
    assert str(message.receive) == "receive activation 0c1"


@pytest.mark.parametrize(("mode", "c"), FORMS)
@pytest.mark.parametrize("p", range(1, 9))
def test_every_tensor_is_sent_once_received_in_order_and_there_in_time(mode: str, c: int, p: int) -> None:
    for m in range(1, 21):
        if mode == "1F1B" and c > 1 and m % p:
            continue
        bare = make_schedule(mode, p, m, c)
        schedule = with_communication(bare)
        sent, received = defaultdict(list), defaultdict(list)
        for rank, actions in enumerate(schedule.actions):
            assert tuple(action for action in actions if action.kind in COMPUTE) == bare.actions[rank]
            waiting: set[Action] = set()
            for number, action in enumerate(actions):
                if action.kind in RECEIVES:
                    waiting.add(action)
                    place = bare.placement.before(rank, action.chunk)
                    if action.kind is ActionKind.RECV_GRADIENT:
                        place = bare.placement.after(rank, action.chunk)
                    assert place is not None and place.rank != rank
                    received[place.rank, rank, action.kind].append(action)
                    # A receive costs a buffer: few are open at a time.
                    assert len(waiting) <= 2
                elif action.kind in COMPUTE:
                    waiting.discard(receive_before(action))
                    message = message_from(bare.placement, rank, action)
                    if message is not None:
                        assert actions[number + 1] == message.send
                        channel = message.channel.sender, message.channel.receiver, message.receive.kind
                        sent[channel].append(message.receive)
            assert not waiting
        assert sent == received
        # Posted one action ahead, a receive delays no tensor that travels no longer than an action takes.
        costs = Costs(transfer=1)
        assert simulate(schedule, costs).events == simulate(bare, costs).events
