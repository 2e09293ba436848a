"""Every schedule computes its step, in the time and the memory that its source states."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from internlm.core.scheduler.actions import Action, ActionKind
from internlm.core.scheduler.schedules import PipelineSchedule, make_schedule
from internlm.core.scheduler.simulator import Costs, simulate
from internlm.core.scheduler.stage_placement import Placement
from internlm.utils.errors import ConfigError

RANKS = range(2, 9)
MICRO_BATCHES = range(1, 21)
FORMS = [("1F1B", 1), ("1F1B", 2), ("1F1B", 3), ("ZBH1", 1), ("ZBV", 2), ("DUALPIPEV", 2)]
"""(mode, chunks)."""


def micro_batches_of(mode: str, p: int, c: int) -> list[int]:
    """The numbers of micro batches that a schedule takes: interleaved, multiples of the ranks."""
    return [m for m in MICRO_BATCHES if not (mode == "1F1B" and c > 1 and m % p)]


@pytest.mark.parametrize(("mode", "c"), FORMS)
@pytest.mark.parametrize("p", RANKS)
def test_every_schedule_computes_a_step_for_any_number_of_micro_batches(mode: str, c: int, p: int) -> None:
    for m in micro_batches_of(mode, p, c):
        schedule = make_schedule(mode, p, m, c)
        assert (len(schedule.actions), schedule.num_micro_batches) == (p, m)
        simulate(schedule)  # raises where an action is missing, twice, too early, or never reached


@pytest.mark.parametrize("mode", ["1F1B", "ZBH1", "ZBV", "DUALPIPEV"])
@pytest.mark.parametrize("c", [1, 2, 3])
def test_one_rank_runs_each_micro_batch_alone(mode: str, c: int) -> None:
    schedule = make_schedule(mode, 1, 2, c)
    timeline = simulate(schedule)
    assert (timeline.peak_live(0), timeline.bubble()) == (c, 0)
    if c == 2:
        assert " ".join(map(str, schedule.actions[0])) == "F0 F0c1 B0c1 B0 F1 F1c1 B1c1 B1"


@pytest.mark.parametrize("p", RANKS)
@pytest.mark.parametrize("c", [1, 2, 3])
def test_bubble_of_1f1b(p: int, c: int) -> None:
    """Narayanan et al. 2021 (arXiv:2104.04473), section 2.2: idle / ideal time = (p - 1) / (m c) for any F and B.

    So of the whole step (p - 1) / (m c + p - 1) is idle."""
    for m in micro_batches_of("1F1B", p, c):
        if c > 1 or m >= p:
            for costs in (Costs(), Costs(forward=3, backward_input=4, backward_weight=1)):
                timeline = simulate(make_schedule("1F1B", p, m, c), costs)
                assert all(timeline.bubble(rank) == (p - 1) / (m * c + p - 1) for rank in (*range(p), None))


@pytest.mark.parametrize("p", RANKS)
def test_bubble_of_zb_h1(p: int) -> None:
    """Qi et al. 2024 (arXiv:2401.10241), table 1: (p - 1)(F + I - W), which holds for W up to F and I."""
    for costs in (Costs(1, 1, 1), Costs(2, 2, 1), Costs(3, 4, 2), Costs(2, 3, 2)):
        for m in range(p, 21):
            timeline = simulate(make_schedule("ZBH1", p, m), costs)
            expected = (p - 1) * (costs.forward + costs.backward_input - costs.backward_weight)
            assert [timeline.idle(rank) for rank in range(p)] == [expected] * p


@pytest.mark.parametrize("p", RANKS)
def test_zb_v_has_no_bubble(p: int) -> None:
    """Qi et al. 2024 (arXiv:2405.15362), section 4: with F = I = W a rank that has begun is never idle until it ends.

    The ranks begin one after the other, each one forward later."""
    for m in range(2 * p - 1, 21):
        timeline = simulate(make_schedule("ZBV", p, m, 2))
        assert [timeline.idle_between(rank) for rank in range(p)] == [0] * p
        assert [timeline.idle(rank) for rank in range(p)] == [p - 1] * p


@pytest.mark.parametrize("p", RANKS)
def test_bubble_of_dual_pipe_v(p: int) -> None:
    """github.com/deepseek-ai/DualPipe, table of bubbles: (p - 1)(F&B + B - 3W) with B = I + W.

    There F&B is a forward and a backward that overlap and end together. Here the forward ends, and sends, before the
    backward starts, which can only make the bubble smaller."""
    for costs in (Costs(1, 1, 1), Costs(2, 2, 1), Costs(3, 4, 2), Costs(2, 3, 3)):
        whole = costs.backward_input + costs.backward_weight
        published = (p - 1) * (costs.forward + whole + whole - 3 * costs.backward_weight)
        for m in range(2 * p, 21):
            timeline = simulate(make_schedule("DUALPIPEV", p, m, 2), costs)
            assert all(timeline.idle(rank) <= published for rank in range(p))
            if costs == Costs():
                assert timeline.idle(0) == p - 1


@pytest.mark.parametrize("p", RANKS)
def test_peaks_of_live_activations(p: int) -> None:
    """In activations of one chunk, by rank.

    1F1B: as many as ranks are left to the end (arXiv:2104.04473, section 2.2); interleaved: its warm-up and one more
    (section 2.2, Megatron-LM `get_pp_rank_microbatches`); ZB-H1: p, the peak of 1F1B's first rank, on all ranks
    (arXiv:2401.10241, section 2.3); ZB-V: 2p halves on all ranks (arXiv:2405.15362); DualPipeV: 2p + 1 halves ("PP + 1"
    of PP = 2p stages, github.com/deepseek-ai/DualPipe).
    """
    for mode, c in FORMS:
        for m in micro_batches_of(mode, p, c):
            timeline = simulate(make_schedule(mode, p, m, c))
            for rank in range(p):
                bound = {
                    ("1F1B", 1): p - rank,
                    ("1F1B", 2): 2 * (p - rank - 1) + p + 1,
                    ("1F1B", 3): 2 * (p - rank - 1) + 2 * p + 1,
                    ("ZBH1", 1): p,
                    ("ZBV", 2): 2 * p,
                    ("DUALPIPEV", 2): 2 * p + 1,
                }[mode, c]
                peak = timeline.peak_live(rank)
                # With few micro batches the V ones hold less than the bound and less than all.
                few = mode in ("ZBV", "DUALPIPEV") and m < 2 * p
                assert peak <= min(bound, m * c) if few else peak == min(bound, m * c)


@pytest.mark.parametrize(
    ("numbers", "named"),
    [
        (("GPIPE", 2, 2, 1), ["mode = 'GPIPE'", "1F1B, ZBH1, ZBV, DUALPIPEV"]),
        (("1F1B", 4, 6, 2), ["num_micro_batches = 6", "num_ranks = 4", "num_chunks = 2"]),
        (("ZBH1", 2, 2, 2), ["num_chunks = 2", "mode = 'ZBH1'", "set it to 1"]),
        (("ZBV", 2, 4, 1), ["num_chunks = 1", "mode = 'ZBV'", "set it to 2"]),
        (("1F1B", 2, 0, 1), ["num_micro_batches = 0"]),
    ],
)
def test_what_does_not_exist_is_refused_by_name(numbers: tuple[str, int, int, int], named: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        make_schedule(*numbers)
    assert all(text in str(error.value) for text in named)


# -- torch's own schedules as an oracle: their lists come from private methods, called without stages or process groups


def torch_schedule(name: str) -> Any:
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    found = getattr(schedules, name, None)
    if found is None:
        pytest.skip(f"this torch has no {name}")
    return found


def in_our_terms(action: Any, placement: Placement) -> list[Action]:
    """An action of torch as ours; one that overlaps two is both, and no action is none."""
    if action is None:
        return []
    if getattr(action, "sub_actions", None):
        return [ours for part in action.sub_actions for ours in in_our_terms(part, placement)]
    kind = ActionKind.__members__.get(action.computation_type.name.removeprefix("FULL_"))
    if kind is None:  # a reduction of gradients
        return []
    return [Action(kind, action.microbatch_index, placement.place_of(action.stage_index).chunk)]


def assert_equal_to_torch(schedule: PipelineSchedule, lists: list[list[Any]], *, with_weights: bool = True) -> None:
    """The same actions in the same order on every rank; `lists` has one list a rank."""
    for ours, theirs in zip(schedule.actions, lists, strict=True):
        translated = [action for entry in theirs for action in in_our_terms(entry, schedule.placement)]
        assert set(ours) == set(translated)
        assert [action for action in ours if with_weights or action.kind is not ActionKind.BACKWARD_WEIGHT] == [
            action for action in translated if with_weights or action.kind is not ActionKind.BACKWARD_WEIGHT
        ]


@pytest.mark.parametrize("p", RANKS)
def test_1f1b_is_the_order_of_torch(p: int) -> None:
    order = getattr(torch_schedule("Schedule1F1B"), "_get_pipeline_order", None)
    if order is None:
        pytest.skip("this torch does not list the actions of 1F1B")
    for m in range(p, 21):  # with fewer, torch lists more micro batches than there are
        lists = order(SimpleNamespace(_num_stages=p, _n_microbatches=m))
        # torch does not run from this listing, and counts the last rank's forwards, which has no warm-up, from 1.
        lists[p - 1] = [
            action._replace(microbatch_index=action.microbatch_index - 1)
            if action is not None and action.computation_type.name == "FORWARD"
            else action
            for action in lists[p - 1]
        ]
        assert_equal_to_torch(make_schedule("1F1B", p, m), [lists[rank] for rank in range(p)])


@pytest.mark.parametrize("p", RANKS)
@pytest.mark.parametrize(
    ("name", "mode", "c"),
    [
        ("ScheduleInterleaved1F1B", "1F1B", 2),
        ("ScheduleInterleaved1F1B", "1F1B", 3),
        ("ScheduleInterleavedZeroBubble", "ZBH1", 1),
        ("ScheduleZBVZeroBubble", "ZBV", 2),
        ("ScheduleDualPipeV", "DUALPIPEV", 2),
    ],
)
def test_lists_are_those_of_torch(p: int, name: str, mode: str, c: int) -> None:
    schedule = torch_schedule(name)
    for m in micro_batches_of(mode, p, c):
        if mode == "DUALPIPEV" and m < 2 * p:
            continue  # refused there
        rounds = max(1, m // p) if c > 1 else 1
        numbers = SimpleNamespace(
            pp_group_size=p, num_stages=p * c, n_local_stages=c, _n_microbatches=m, microbatches_per_round=m // rounds
        )
        lists = [schedule._calculate_single_rank_operations(numbers, rank) for rank in range(p)]
        # Of the weight gradients that are due at the end of ZBV torch takes those of the second chunk first.
        assert_equal_to_torch(make_schedule(mode, p, m, c), lists, with_weights=mode != "ZBV")


def test_the_most_activations_that_a_rank_keeps() -> None:
    assert make_schedule("1F1B", 1, 5).max_in_flight == 1
    assert make_schedule("1F1B", 4, 8).max_in_flight == 4
    assert make_schedule("1F1B", 4, 2).max_in_flight == 2
    # Megatron-LM's count for the first of 4 ranks with 2 chunks: 2 (p - 1) + p in the warm-up, and the one at work.
    assert make_schedule("1F1B", 4, 8, 2).max_in_flight == 2 * 3 + 4 + 1
    assert make_schedule("ZBV", 4, 8, 2).max_in_flight == 8
