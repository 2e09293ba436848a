"""Compares a run in a layout with the same run in one process, within what rounding can explain."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from internlm.verify.case import Case
from internlm.verify.record import Array, Record

# GEMMs, element-wise operations and reductions that a value passes, one after the other, from a layer's input
# to its output (norm, projection, rotary, scores, softmax, weighting, projection, sum; norm, projection, gate,
# projection, sum), and about twice as many on the way back.
ROUNDINGS_PER_LAYER = 40

# Embedding, final norm, head, loss, and the sum over micro batches and ranks.
ROUNDINGS_OUTSIDE = 20

FP32_LOSS = 1e-5
"""Relative difference of losses in fp32 that the project promises to stay below."""


@dataclass(frozen=True)
class Tolerance:
    """Largest differences in the first step, relative to what is compared; see `tolerance_of`.

    Attributes:
        loss: of the loss.
        gradient: of the norm of the gradient, and of the L2 norm of each tensor's gradient.
        weight: rounding of a stored weight, relative to the L2 norm of the tensor.
        update: how far a gradient's error moves a weight: the largest learning rate over AdamW's epsilon.
        response: relative change of a gradient for one of all weights: every layer adds that of its own.
    """

    loss: float
    gradient: float
    weight: float
    update: float
    response: float


def rounding_of_gradients(dtype: torch.dtype, num_layers: int, num_terms: int) -> float:
    """Largest difference between the gradients of two runs, relative to the norm of a tensor, that rounding explains.

    A gradient passes `n = ROUNDINGS_PER_LAYER * layers + ROUNDINGS_OUTSIDE` roundings to `eps` of the model's dtype.
    They are as good as independent, so that they add up to sqrt(n) of one. It is summed in fp32 over N terms; the error
    of that is relative to the sum of the terms' sizes, which for terms of either sign is sqrt(N) times the size of the
    sum. Both runs are off by as much. (In float64 sums are as good as exact; fp32 then stands for rounding what is
    recorded.) So the difference is below

        sqrt(2) * (eps * sqrt(n) + eps32 * sqrt(N)).

    Args:
        dtype: of weights and computation.
        num_terms: tokens, times the heads that a norm of heads is summed over.
    """
    roundings = ROUNDINGS_PER_LAYER * num_layers + ROUNDINGS_OUTSIDE
    return math.sqrt(2) * (_unit(dtype) * math.sqrt(roundings) + _unit(torch.float32) * math.sqrt(num_terms))


def _unit(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def tolerance_of(case: Case) -> Tolerance:
    """What rounding can explain.

    For gradients see `rounding_of_gradients`. A weight is rounded to its dtype, and moves by lr / adam_eps times the
    error of the gradient at most (`case.py` says why adam_eps is large here).
    """
    config = case.config
    dtype = config.model.torch_dtype
    terms = case.num_micro_batches * config.data.packed_length * config.model.num_attention_heads
    gradient = rounding_of_gradients(dtype, config.model.num_layers, terms)
    if config.reduce_comm_dtype not in (None, "torch.float32"):
        # Each gradient is rounded once more where it enters a sum over ranks, and after every addition.
        gradient += math.sqrt(2) * _unit(torch.bfloat16) * math.sqrt(case.world_size)
    if config.hybrid_zero_optimizer.grad_accumulation_dtype == "torch.bfloat16":
        # The same where it enters the sum over micro batches, and over ranks.
        gradient += math.sqrt(2) * _unit(torch.bfloat16) * math.sqrt(case.num_micro_batches + case.world_size)
    if config.adam.moments_dtype == "torch.bfloat16":
        # Moments that are rounded up in one run and down in the other move weights as such gradients would.
        gradient += 2 * _unit(torch.bfloat16)
    # Losses are summed, and all is recorded, in fp32 at best.
    loss = FP32_LOSS if dtype in (torch.float32, torch.float64) else gradient
    weight = 2 * max(_unit(dtype), _unit(torch.float32))
    lr = config.adam.lr * max([1.0, *(group.lr_factor for group in config.optimizer.groups)])
    return Tolerance(loss, gradient, weight, lr / config.adam.adam_eps, config.model.num_layers + 1)


@dataclass(frozen=True)
class RunDifference:
    """Two runs differ.

    Attributes:
        step: 1 for the first; 0 for the weights before it.
        what: "loss", "gradient norm", "gradient of <name>", "weight <name>" ...
        amount, allowed: the relative difference, and the largest that rounding explains.
        detail: the two values, or where the parameter is.
    """

    step: int
    what: str
    amount: float
    allowed: float
    detail: str

    def __str__(self) -> str:
        return (
            f"step {self.step}: {self.what} differs by {self.amount:.2g} (allowed {self.allowed:.2g} relative to the "
            f"reference); {self.detail}"
        )


@dataclass(frozen=True)
class StepComparison:
    """Largest relative differences of one step, for the table.

    Attributes:
        loss, reference_loss: the values.
        grad_norm, gradient, weight: relative differences; of all tensors the largest.
        within: the largest share that a difference has in what is allowed; above 1 it is a failure.
    """

    step: int
    loss: float
    reference_loss: float
    grad_norm: float
    gradient: float
    weight: float
    within: float


def compare(record: Record, reference: Record, tolerance: Tolerance) -> list[RunDifference]:
    """Every difference beyond the tolerance, by step; in a step first loss and norm, then tensors in model order."""
    differences = list(_initial_differences(record, reference))
    for number, _ in enumerate(reference.steps, start=1):
        differences += [found for found in _measure(record, reference, number, tolerance) if _is_beyond(found)]
    return differences


def summarize(record: Record, reference: Record, tolerance: Tolerance) -> list[StepComparison]:
    """The differences of each step, within the tolerance or not."""
    rows = []
    for number, (step, other) in enumerate(zip(record.steps, reference.steps, strict=True), start=1):
        found = list(_measure(record, reference, number, tolerance))

        def largest(kind: str, found: list[RunDifference] = found) -> float:
            return max((one.amount for one in found if one.what.startswith(kind)), default=0.0)

        within = max(math.inf if math.isnan(one.amount) else one.amount / one.allowed for one in found)
        norm, gradient, weight = largest("gradient norm"), largest("gradient of"), largest("weight")
        rows.append(StepComparison(number, step.loss, other.loss, norm, gradient, weight, within))
    return rows


def _is_beyond(difference: RunDifference) -> bool:
    return not difference.amount <= difference.allowed  # NaN is beyond


def _initial_differences(record: Record, reference: Record) -> Iterator[RunDifference]:
    """Weights start from the same bits in every layout."""
    for name in sorted(reference.initial.keys() ^ record.initial.keys()):
        side = "in one process" if name in reference.initial else "in this layout"
        yield RunDifference(0, f"parameter {name}", math.inf, 0.0, f"it is there only {side}")
    for name, expected in reference.initial.items():
        if name in record.initial and not np.array_equal(expected, record.initial[name]):
            amount = _relative(record.initial[name], expected)
            yield RunDifference(0, f"initial weight {name}", amount, 0.0, record.placements.get(name, ""))


def _measure(record: Record, reference: Record, number: int, tolerance: Tolerance) -> Iterator[RunDifference]:
    """All that is compared in step `number`."""
    step, other = record.steps[number - 1], reference.steps[number - 1]
    allowed_gradient = _allowed_gradient(reference, number, tolerance)
    for what, value, expected, allowed in (
        ("loss", step.loss, other.loss, tolerance.loss),
        ("gradient norm", step.grad_norm, other.grad_norm, allowed_gradient),
    ):
        amount = abs(value - expected) / abs(expected) if expected else abs(value)
        yield RunDifference(number, what, amount, allowed, f"{value!r} instead of {expected!r}")
    amounts = gradient_differences(step.gradients, other.gradients)
    for name in reference.initial:  # in model order
        if name not in amounts:
            continue  # frozen in both runs
        yield RunDifference(
            number, f"gradient of {name}", amounts[name], allowed_gradient, record.placements.get(name, "")
        )
    for name, wanted in other.weights.items():
        norm = float(np.linalg.norm(wanted)) or 1.0
        errors = (
            _allowed_gradient(reference, past, tolerance)
            * max(float(np.linalg.norm(gradients[name])), _term_size(name, gradients))
            for past, gradients in enumerate((step.gradients for step in reference.steps[:number]), start=1)
            if name in gradients  # not of a frozen weight
        )
        allowed = tolerance.weight * number + tolerance.update * sum(errors) / norm
        amount = _relative(step.weights.get(name), wanted)
        yield RunDifference(number, f"weight {name}", amount, allowed, record.placements.get(name, ""))


def _allowed_gradient(reference: Record, number: int, tolerance: Tolerance) -> float:
    """Largest relative difference of a gradient of step `number`.

    Each step adds an error of the first one's size. And the errors of the gradients before have moved the weights, by
    `tolerance.update` times as much, to which gradients respond.
    """
    past = reference.steps[: number - 1]
    moved = sum(tolerance.update * _norm_of_all(step.gradients) / _norm_of_all(step.weights) for step in past)
    return tolerance.gradient * (number + tolerance.response * moved)


def _norm_of_all(tensors: dict[str, Array]) -> float:
    return math.sqrt(sum(float(np.linalg.norm(tensor)) ** 2 for tensor in tensors.values()))


def gradient_differences(gradients: Mapping[str, Array], expected: Mapping[str, Array]) -> dict[str, float]:
    """By name the L2 norm of each difference, relative to what rounding is relative to; infinite where one lacks.

    A frozen weight has no gradient in either run, and no entry.
    """
    amounts = {
        name: _relative(gradients.get(name), value, _term_size(name, expected)) for name, value in expected.items()
    }
    return amounts | dict.fromkeys(gradients.keys() - expected.keys(), math.inf)


def _term_size(name: str, gradients: Mapping[str, Array]) -> float:
    """A norm that the terms of a bias's gradient add up to when they do not cancel; 0 for other parameters.

    The gradient of a bias is that of its weight for an input of ones, so that the terms of both are as large. Those of
    a key's bias cancel almost wholly: a constant on all keys moves all scores of a query alike, which softmax ignores.
    What is left is rounding of the terms.
    """
    weight = gradients.get(f"{name.removesuffix('.bias')}.weight") if name.endswith(".bias") else None
    return 0.0 if weight is None or weight.ndim < 2 else float(np.linalg.norm(weight)) / math.sqrt(weight.shape[1])


def _relative(values: Array | None, expected: Array, smallest: float = 0.0) -> float:
    """L2 norm of the difference over that of `expected`, or over `smallest`; the norm itself where both are 0."""
    if values is None or values.shape != expected.shape:
        return math.inf
    difference = float(np.linalg.norm((values - expected).astype(np.float64)))
    return difference / (max(smallest, float(np.linalg.norm(expected.astype(np.float64)))) or 1.0)
