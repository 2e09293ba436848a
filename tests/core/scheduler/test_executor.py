"""The executor does what any list of actions says, and keeps no tensor longer than it must."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from internlm.core.parallel.linear.weight_gradients import WeightGradients
from internlm.core.parallel.parameter_events import deliver_gradient
from internlm.core.progress.record import Progress
from internlm.core.scheduler.actions import Action, ActionKind
from internlm.core.scheduler.executor import Executor
from internlm.core.scheduler.schedules import PipelineSchedule, forward_only, make_schedule
from internlm.core.scheduler.stage_placement import Placement


class Chunks:
    """`x -> x * weight` for every chunk of one rank; the model begins with the micro batch's number plus 1."""

    def __init__(self, num_chunks: int, weight_gradients: WeightGradients | None = None) -> None:
        self.weights = [nn.Parameter(torch.full((1,), 2.0 + chunk)) for chunk in range(num_chunks)]
        self.outputs: list[weakref.ref[Tensor]] = []
        self.results: list[float] = []
        self.alive_at_forward: list[int] = []

    def forward(self, micro_batch: int, chunk: int, received: Tensor | None) -> Tensor:
        self.alive_at_forward.append(sum(output() is not None for output in self.outputs))
        assert (received is None) == (chunk == 0)
        start = torch.full((1,), micro_batch + 1.0) if received is None else received
        output = start * self.weights[chunk]
        self.outputs.append(weakref.ref(output))
        if chunk == len(self.weights) - 1:
            self.results.append(float(output.detach()))
            return output.sum()
        return output


def no_buffer(micro_batch: int) -> Tensor:
    raise AssertionError("one rank receives nothing")


@pytest.mark.parametrize("num_chunks", [1, 2, 3])
def test_chunks_of_one_rank_hand_over_to_each_other(num_chunks: int) -> None:
    chunks = Chunks(num_chunks)
    Executor(0, WeightGradients()).run(make_schedule("1F1B", 1, 3, num_chunks), chunks.forward, no_buffer)
    product = float(torch.prod(torch.stack([weight.detach() for weight in chunks.weights])))
    assert chunks.results == [product * number for number in (1, 2, 3)]
    # d/dw of the sum over micro batches of (m + 1) * product.
    assert [float(weight.grad) for weight in chunks.weights] == [6 * product / (2 + c) for c in range(num_chunks)]  # type: ignore[arg-type]
    # An output is gone when the next forward pass runs: what is kept of it is the way back.
    assert set(chunks.alive_at_forward) == {0}


def phases_of(schedule: PipelineSchedule, chunks: Chunks) -> list[str]:
    """All phases of a run, in order."""
    phases: list[str] = []

    class Recorder(Progress):
        def mark(self, phase: str) -> None:
            phases.append(phase)

    Executor(0, WeightGradients(), progress=Recorder()).run(schedule, chunks.forward, no_buffer)
    return phases


def test_phases_name_what_was_being_done() -> None:
    phases = phases_of(make_schedule("1F1B", 1, 1, 2), Chunks(2))
    assert phases == [
        "forward of micro-batch 0, chunk 0",
        "receive activation of micro-batch 0, chunk 1",
        "forward of micro-batch 0, chunk 1",
        "backward of micro-batch 0, chunk 1",
        "receive gradient of micro-batch 0, chunk 0",
        "backward of micro-batch 0, chunk 0",
    ]
    assert phases_of(make_schedule("1F1B", 1, 1), Chunks(1)) == [
        "forward of micro-batch 0",
        "backward of micro-batch 0",
    ]


@torch.no_grad()
def evaluate(chunks: Chunks) -> None:
    Executor(0, WeightGradients()).run(forward_only(Placement(1, len(chunks.weights))), chunks.forward, no_buffer)


def test_forward_only_leaves_no_gradient() -> None:
    chunks = Chunks(2)
    evaluate(chunks)
    assert chunks.results == [6.0]
    assert all(weight.grad is None for weight in chunks.weights)


# -- weight gradients that come later -------------------------------------------------------------------------------


class _Times(torch.autograd.Function):
    """`x * weight`; the gradient of the weight goes through `WeightGradients`."""

    @staticmethod
    def forward(ctx, x, weights, weight_gradients, log):  # type: ignore[no-untyped-def]
        ctx.x, ctx.weight, ctx.weight_gradients, ctx.log = x.detach(), weights[0], weight_gradients, log
        return x * weights[0]

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        def compute() -> None:
            ctx.log.append(f"W{float(ctx.x):.0f}")
            deliver_gradient(ctx.weight, gradient * ctx.x)

        ctx.log.append(f"I{float(ctx.x):.0f}")
        ctx.weight_gradients.compute(compute)
        return gradient * ctx.weight.detach(), None, None, None


def in_order(actions: str) -> PipelineSchedule:
    """A schedule of one rank and chunk, such as "F0 I0 W0"."""
    listed = tuple(Action(ActionKind(word[0]), int(word[1:])) for word in actions.split())
    return replace(make_schedule("1F1B", 1, 1), actions=(listed,))


def run_later(actions: str) -> tuple[list[str], float]:
    weight = nn.Parameter(torch.full((1,), 3.0))
    weight_gradients, log = WeightGradients(), list[str]()

    def forward(micro_batch: int, chunk: int, received: Tensor | None) -> Tensor:
        start = torch.full((1,), micro_batch + 1.0, requires_grad=True)
        return _Times.apply(start, [weight], weight_gradients, log).sum()  # type: ignore[no-any-return]

    Executor(0, weight_gradients).run(in_order(actions), forward, no_buffer)
    weight_gradients.check_empty()
    assert weight.grad is not None
    return log, float(weight.grad)


def test_a_weight_gradient_is_computed_when_the_schedule_says_so() -> None:
    assert run_later("F0 F1 I0 I1 W0 W1") == (["I1", "I2", "W1", "W2"], 3.0)
    assert run_later("F0 B0 F1 I1 W1") == (["I1", "W1", "I2", "W2"], 3.0)


def test_a_forgotten_weight_gradient_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"never computed: \[\(0, 1\)\]"):
        run_later("F0 F1 I0 I1 W0")
