"""The simulator refuses what would not run, and its times are those that one can count by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from internlm.core.scheduler.actions import Action, ActionKind
from internlm.core.scheduler.communication import with_communication
from internlm.core.scheduler.schedules import PipelineSchedule, make_schedule
from internlm.core.scheduler.simulator import Costs, ScheduleError, simulate
from internlm.core.scheduler.stage_placement import Placement


def changed(schedule: PipelineSchedule, rank: int, order: str) -> PipelineSchedule:
    """The schedule with the list of one rank written anew, such as "F0 B0"."""
    actions = tuple(Action(ActionKind(word[0]), int(word[1:])) for word in order.split())
    return replace(schedule, actions=(*schedule.actions[:rank], actions, *schedule.actions[rank + 1 :]))


def test_times_of_two_ranks_by_hand() -> None:
    timeline = simulate(make_schedule("1F1B", 2, 2), Costs(forward=2, backward_input=3, backward_weight=1, transfer=1))
    times = [[(str(action), start, end) for start, end, action in row] for row in timeline.events]
    assert times[0] == [("F0", 0, 2), ("F1", 2, 4), ("B0", 10, 14), ("B1", 16, 20)]
    assert times[1] == [("F0", 3, 5), ("B0", 5, 9), ("F1", 9, 11), ("B1", 11, 15)]
    assert (timeline.end, timeline.busy(0), timeline.idle(1), timeline.idle_between(0), timeline.idle_between(1)) == (
        20,
        12,
        8,
        8,
        0,
    )
    assert timeline.bubble(0) == timeline.bubble() == 8 / 20
    assert (timeline.peak_live(0), timeline.peak_live(1)) == (2, 1)


def test_input_gradients_travel_before_weight_gradients_are_there() -> None:
    schedule = PipelineSchedule("one", Placement(2), ((), ()))
    schedule = changed(changed(schedule, 0, "F0 B0"), 1, "F0 I0 W0")
    assert [event.start for event in simulate(schedule).events[0]] == [0, 3]
    assert [event.start for event in simulate(changed(schedule, 1, "F0 B0")).events[0]] == [0, 4]


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ("F0 F1 B0", r"rank 0 has F, B, I, W \[1, 0, 0, 0\] times for micro-batch 1"),
        ("F0 F1 B0 B1 B1", r"\[1, 2, 0, 0\] times for micro-batch 1"),
        ("F0 F1 B0 I1", r"\[1, 0, 1, 0\]"),
        ("F0 F1 B0 B1 W1", r"\[1, 1, 0, 1\]"),
        ("B0 F0 F1 B1", "deadlock; rank 0 waits at action 0, B0; rank 1 waits at action 0, F0"),
        ("F0 F1 W0 I0 B1", "rank 0 waits at action 2, W0"),
    ],
)
def test_what_would_not_compute_a_step_is_refused(order: str, message: str) -> None:
    schedule = changed(make_schedule("1F1B", 2, 2), 0, order)
    with pytest.raises(ScheduleError, match=message):
        simulate(schedule)


def test_ranks_that_wait_for_each_other_are_named() -> None:
    schedule = changed(changed(make_schedule("1F1B", 2, 2), 0, "F0 B0 F1 B1"), 1, "F0 F1 B0 B1")
    for lists in (schedule, with_communication(schedule)):
        with pytest.raises(ScheduleError, match=r"rank 0 waits at action \d, B0; rank 1 waits at action \d, F1"):
            simulate(lists)


def test_a_chunk_that_the_rank_does_not_hold_is_refused() -> None:
    schedule = make_schedule("1F1B", 2, 1)
    extra = Action(ActionKind.FORWARD, 0, chunk=1)
    with pytest.raises(ScheduleError, match="rank 0 has no chunk for F0c1"):
        simulate(replace(schedule, actions=((*schedule.actions[0], extra), schedule.actions[1])))


def test_a_tensor_travels_when_its_receive_is_posted_and_the_channel_is_free() -> None:
    schedule = with_communication(make_schedule("1F1B", 2, 2))
    costs = Costs(backward_input=0.5, backward_weight=0.5, transfer=3)
    first, last = schedule.actions

    def start_of_second_forward(actions: tuple[Action, ...]) -> float:
        timeline = simulate(replace(schedule, actions=(first, actions)), costs)
        return next(start for start, _, action in timeline.events[1] if str(action) == "F1")

    # Sent at 1 and 2. The first arrives at 4 and is used until 5; only then the second receive is posted.
    assert start_of_second_forward(last) == 5 + 3
    posts = tuple(action for action in last if action.kind is ActionKind.RECV_ACTIVATION)
    assert start_of_second_forward((*posts, *(action for action in last if action not in posts))) == 4 + 3


def test_communication_that_does_not_fit_is_refused() -> None:
    schedule = with_communication(make_schedule("1F1B", 2, 2))
    first, last = schedule.actions

    def without(kind: ActionKind) -> PipelineSchedule:
        return replace(schedule, actions=(tuple(a for a in first if a.kind is not kind), last))

    with pytest.raises(ScheduleError, match="rank 1 waits at action 1, F0"):
        simulate(without(ActionKind.SEND_ACTIVATION))
    with pytest.raises(ScheduleError, match="rank 0 waits at action 4, B0"):
        simulate(without(ActionKind.RECV_GRADIENT))

    posts = [a for a in last if a.kind is ActionKind.RECV_ACTIVATION]
    swapped = (*reversed(posts), *(a for a in last if a not in posts))
    with pytest.raises(ScheduleError, match=r"rank 1 receives .*micro_batch=1.*, but rank 0 sends .*micro_batch=0"):
        simulate(replace(schedule, actions=(first, swapped)))

    twice = (*last, posts[0])
    with pytest.raises(ScheduleError, match="only one of ranks 0 and 1 sends or receives"):
        simulate(replace(schedule, actions=(first, twice)))

    early = (first[1], first[0], *first[2:])
    with pytest.raises(ScheduleError, match="rank 0 waits at action 0, send activation 0"):
        simulate(replace(schedule, actions=(early, last)))
