"""Pipeline schedules: pure functions from the shape of a pipeline to the ordered actions of each rank.

Each schedule is written in phases, as in its source; a phase repeats a few actions. "F0" is the next forward of chunk
0, "B1" the next backward of chunk 1, "I0" the next input gradient of chunk 0, and "W" the oldest weight gradient that
is still due. In the formulas, p is the number of ranks, m of micro-batches, c of chunks, and r the rank.

Some formulas need a minimum number of micro-batches. With fewer, the actions of micro-batches that do not exist are
removed: dependencies exist only between actions of one micro-batch, so the rest can still run, in no more memory.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from internlm.core.scheduler.actions import Action, ActionKind
from internlm.core.scheduler.stage_placement import Placement
from internlm.utils.errors import ConfigError
from internlm.utils.layout_checks import check_schedule


@dataclass(frozen=True)
class PipelineSchedule:
    """The actions of all ranks of a pipeline in one step.

    Attributes:
        name: for display.
        placement: which rank holds which stage.
        actions: by index along the pipeline axis, in order.
    """

    name: str
    placement: Placement
    actions: tuple[tuple[Action, ...], ...]

    @property
    def num_micro_batches(self) -> int:
        """Number of micro-batches of the step."""
        return 1 + max(action.micro_batch for action in self.actions[0])

    @cached_property
    def max_in_flight(self) -> int:
        """Largest number of forward passes that any rank has run and whose input gradient it has not computed yet."""
        most = 0
        for actions in self.actions:
            in_flight = 0
            for action in actions:
                if action.kind is ActionKind.FORWARD:
                    in_flight += 1
                    most = max(most, in_flight)
                elif action.kind in (ActionKind.BACKWARD, ActionKind.BACKWARD_INPUT):
                    in_flight -= 1
        return most


@dataclass(frozen=True)
class _Mode:
    """A kind of schedule.

    Attributes:
        name: for display.
        shape: of the placement.
        phases: (p, m, c, r) -> the actions of rank r, such as "F0 B0".
    """

    name: str
    shape: Literal["loop", "v"]
    phases: Callable[[int, int, int, int], Iterable[str]]


def make_schedule(mode: str, num_ranks: int, num_micro_batches: int, num_chunks: int = 1) -> PipelineSchedule:
    """The compute actions of a step; `with_communication` adds sends and receives.

    Args:
        mode: one of `MODES`. Ignored for one rank, which runs one micro-batch at a time.
        num_ranks: ranks of the pipeline.
        num_micro_batches: of the step, 1 or more.
        num_chunks: model chunks per rank; 1F1B with more than one is interleaved.

    Raises:
        ConfigError: the mode does not exist, or does not support these numbers.
    """
    if mode not in MODES:
        raise ConfigError(f"mode = {mode!r}: no such schedule; use one of {', '.join(MODES)}")
    chosen = MODES[mode]
    check_schedule(mode, num_ranks, num_chunks, num_micro_batches)
    if num_ranks == 1:
        return _build("no pipeline", Placement(1, num_chunks), num_micro_batches, _no_pipeline)
    name = "interleaved 1F1B" if mode == "1F1B" and num_chunks > 1 else chosen.name
    return _build(name, Placement(num_ranks, num_chunks, chosen.shape), num_micro_batches, chosen.phases)


def forward_only(placement: Placement) -> PipelineSchedule:
    """The forward pass of one micro-batch through all stages."""
    once = tuple(Action(ActionKind.FORWARD, 0, chunk) for chunk in range(placement.num_chunks))
    return PipelineSchedule("forward only", placement, (once,) * placement.num_ranks)


def _build(
    name: str, placement: Placement, num_micro_batches: int, phases: Callable[[int, int, int, int], Iterable[str]]
) -> PipelineSchedule:
    actions = []
    for rank in range(placement.num_ranks):
        numbered = _number(phases(placement.num_ranks, num_micro_batches, placement.num_chunks, rank))
        actions.append(tuple(action for action in numbered if action.micro_batch < num_micro_batches))
    return PipelineSchedule(name, placement, tuple(actions))


def _number(phases: Iterable[str]) -> Iterable[Action]:
    """The actions of phases such as "F0 B0", with micro-batch numbers: each chunk takes its micro-batches in order."""
    counts: Counter[tuple[bool, int]] = Counter()
    due: deque[tuple[int, int]] = deque()
    for word in " ".join(phases).split():
        kind = ActionKind(word[0])
        if kind is ActionKind.BACKWARD_WEIGHT:
            micro_batch, chunk = due.popleft()
        else:
            chunk = int(word[1:])
            direction = kind is ActionKind.FORWARD, chunk
            micro_batch = counts[direction]
            counts[direction] += 1
            if kind is ActionKind.BACKWARD_INPUT:
                due.append((micro_batch, chunk))
        yield Action(kind, micro_batch, chunk)


def _no_pipeline(p: int, m: int, c: int, r: int) -> Iterable[str]:
    """One rank: one micro-batch is in flight at a time."""
    once = [f"F{chunk}" for chunk in range(c)] + [f"B{chunk}" for chunk in reversed(range(c))]
    return once * m


def _one_forward_one_backward(p: int, m: int, c: int, r: int) -> Iterable[str]:
    """1F1B (PipeDream-Flush, arXiv:2006.09503); with c > 1 interleaved (Megatron-LM, arXiv:2104.04473, section 2.2).

    In the interleaved schedule, a rank runs p micro-batches through one chunk, then p through the next.
    """
    forwards = [f"F{k // p % c}" for k in range(m * c)]
    backwards = [f"B{c - 1 - k // p % c}" for k in range(m * c)]
    warm_up = min(p - r - 1 if c == 1 else 2 * (p - r - 1) + (c - 1) * p, m * c)
    yield from forwards[:warm_up]
    for forward, backward in zip(forwards[warm_up:], backwards, strict=False):
        yield from (forward, backward)
    yield from backwards[m * c - warm_up :]


def _zb_h1(p: int, m: int, c: int, r: int) -> Iterable[str]:
    """ZB-H1 (Qi et al., arXiv:2401.10241, section 2.1): 1F1B; weight gradients of rank r are r micro-batches late."""
    warm_up, behind = min(p - r - 1, m), min(r, m)
    backwards = ["F0 I0"] * (m - warm_up) + ["I0"] * warm_up
    yield from ["F0"] * warm_up
    yield from backwards[:behind]
    yield from (f"{backward} W" for backward in backwards[behind:])
    yield from ["W"] * behind


def _zb_v(p: int, m: int, c: int, r: int) -> Iterable[str]:
    """ZB-V (Qi et al., arXiv:2405.15362): two chunks in a V; 2p chunk activations are live on every rank."""
    m = max(m, 2 * p - 1)
    yield "F0 " * (2 * (p - r) - 1)
    yield "F1 F0 " * r
    yield "F1 I1 W " * (p - r)
    yield "F0 I0 W F1 I1 W " * (m - 2 * p + r + 1)
    yield "I0 W F1 I1 W " * (p - r - 1)
    yield "I0 I1 " * r
    yield "I0 W " * (p - r)
    yield "W " * (2 * r)


def _dual_pipe_v(p: int, m: int, c: int, r: int) -> Iterable[str]:
    """DualPipeV: DualPipe (DeepSeek-V3, arXiv:2412.19437, section 3.2.1) cut in half, in eight phases.

    Source: https://github.com/deepseek-ai/DualPipe. It overlaps a forward with a backward in some places; here the
    backward follows the forward.
    """
    m = max(m, 2 * p)
    yield "F0 " * (2 * (p - r - 1))
    yield "F0 F1 " * (r + 1)
    yield "I1 W F1 " * (p - r - 1)
    yield "F0 B1 F1 B0 " * (m - 2 * p + r + 1)
    yield "B1 F1 B0 " * (p - r - 1)
    # r + 1 pairs "B1 B0"; the weight gradients of the second half fill later bubbles.
    yield from (f"{'B' if k <= r else 'I'}{1 - k % 2}" for k in range(2 * (r + 1)))
    yield "W I0 " * (p - r - 1)
    yield "W " * (r + 1)


MODES: dict[str, _Mode] = {
    "1F1B": _Mode("1F1B", "loop", _one_forward_one_backward),
    "ZBH1": _Mode("ZB-H1", "loop", _zb_h1),
    "ZBV": _Mode("ZB-V", "v", _zb_v),
    "DUALPIPEV": _Mode("DualPipeV", "v", _dual_pipe_v),
}
"""Value of `parallel.pipeline.mode` -> schedule."""
