"""Compares a run in a layout with the same run in one process, within the tolerance of rounding."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from internlm.verify.case import Case
from internlm.verify.record import Array, Record
from internlm.verify.vision import num_vision_layers

# Successive GEMMs, element-wise operations and reductions from a layer's input to its output (norm, projection, rotary,
# scores, softmax, weighting, projection, sum; norm, projection, gate, projection, sum), and about twice as many in
# backward.
ROUNDINGS_PER_LAYER = 40

# Embedding, final norm, head, loss, and the sum over micro-batches and ranks.
ROUNDINGS_OUTSIDE = 20

FP32_LOSS = 1e-5
"""Upper limit that the project guarantees for the relative difference of losses in fp32."""


@dataclass(frozen=True)
class Tolerance:
    """Largest relative differences allowed in the first step; see `tolerance_of`.

    Attributes:
        loss: of the loss, and of the metrics of routers.
        gradient: of the global gradient norm, and of the L2 norm of each tensor's gradient.
        weight: rounding of a stored weight, relative to the L2 norm of the tensor.
        update: change of a weight per error of its gradient: the largest learning rate over AdamW's epsilon.
        response: relative change of a gradient per relative change of all weights; every layer contributes 1.
    """

    loss: float
    gradient: float
    weight: float
    update: float
    response: float


def rounding_of_gradients(dtype: torch.dtype, num_layers: int, num_terms: int) -> float:
    """Largest difference of gradients between two runs that rounding explains, relative to a tensor's norm.

    A gradient is rounded `n = ROUNDINGS_PER_LAYER * layers + ROUNDINGS_OUTSIDE` times with the `eps` of the model's
    dtype. The errors are practically independent, so they add up to sqrt(n) times one of them. The gradient is a sum of
    N terms in fp32, whose error is relative to the sum of the terms' magnitudes. For terms of random sign that is
    sqrt(N) times the magnitude of the sum. Both runs have errors of this size. (Sums in float64 are practically exact;
    the fp32 term then accounts for the rounding of the recorded values.) So the difference is below

        sqrt(2) * (eps * sqrt(n) + eps32 * sqrt(N)).

    Args:
        dtype: of weights and computation.
        num_layers: layers of the model.
        num_terms: tokens, times the heads that a per-head norm is summed over.
    """
    roundings = ROUNDINGS_PER_LAYER * num_layers + ROUNDINGS_OUTSIDE
    return math.sqrt(2) * (_unit(dtype) * math.sqrt(roundings) + _unit(torch.float32) * math.sqrt(num_terms))


def _unit(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def tolerance_of(case: Case) -> Tolerance:
    """The largest differences that rounding explains.

    For gradients see `rounding_of_gradients`. A weight is rounded to its dtype, and moves by at most lr / adam_eps
    times the error of its gradient (`case.py` explains why adam_eps is large here).
    """
    config = case.config
    dtype = config.model.torch_dtype
    terms = case.num_micro_batches * config.data.packed_length * config.model.num_attention_heads
    num_layers = config.model.num_layers + config.model.num_nextn_predict_layers + num_vision_layers(config)
    gradient = rounding_of_gradients(dtype, num_layers, terms)
    if config.reduce_comm_dtype not in (None, "torch.float32"):
        # Each gradient is rounded once more when it enters a sum over ranks, and after every addition.
        gradient += math.sqrt(2) * _unit(torch.bfloat16) * math.sqrt(case.world_size)
    if config.hybrid_zero_optimizer.grad_accumulation_dtype == "torch.bfloat16":
        # The same when it enters the sum over micro-batches and ranks.
        gradient += math.sqrt(2) * _unit(torch.bfloat16) * math.sqrt(case.num_micro_batches + case.world_size)
    if config.adam.moments_dtype == "torch.bfloat16":
        # A moment rounded up in one run and down in the other has the effect of a gradient with that difference.
        gradient += 2 * _unit(torch.bfloat16)
    # Losses are summed and recorded in fp32 at best.
    loss = FP32_LOSS if dtype in (torch.float32, torch.float64) else gradient
    weight = 2 * max(_unit(dtype), _unit(torch.float32))
    lr = config.adam.lr * max([1.0, *(group.lr_factor for group in config.optimizer.groups)])
    return Tolerance(loss, gradient, weight, lr / config.adam.adam_eps, num_layers + 1)


@dataclass(frozen=True)
class RunDifference:
    """One difference between two runs.

    Attributes:
        step: 1 for the first step; 0 for the weights before it.
        what: "loss", "gradient norm", "moe/...", "gradient of <name>", "weight <name>" ...
        amount: the relative difference.
        allowed: the largest relative difference that rounding explains.
        detail: the two values, or the placement of the parameter.
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
        step: number of the step, from 1.
        loss: of the layout.
        reference_loss: of one process.
        grad_norm: relative difference of the gradient norm.
        gradient: relative difference of a gradient, the largest over all tensors.
        weight: relative difference of a weight, the largest over all tensors.
        within: the largest ratio of a difference to the allowed one; above 1 the comparison fails.
    """

    step: int
    loss: float
    reference_loss: float
    grad_norm: float
    gradient: float
    weight: float
    within: float


def compare(record: Record, reference: Record, tolerance: Tolerance) -> list[RunDifference]:
    """All differences beyond the tolerance, by step; in a step, loss and norm come before tensors in model order."""
    differences = list(_initial_differences(record, reference))
    for number, _ in enumerate(reference.steps, start=1):
        differences += [found for found in _measure(record, reference, number, tolerance) if _is_beyond(found)]
    return differences


def summarize(record: Record, reference: Record, tolerance: Tolerance) -> list[StepComparison]:
    """The largest differences of each step, whether within the tolerance or not."""
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
    """Differences of the initial weights, which must be bit-equal in every layout."""
    for name in sorted(reference.initial.keys() ^ record.initial.keys()):
        side = "in one process" if name in reference.initial else "in this layout"
        yield RunDifference(0, f"parameter {name}", math.inf, 0.0, f"it exists only {side}")
    for name, expected in reference.initial.items():
        if name in record.initial and not np.array_equal(expected, record.initial[name]):
            amount = _relative(record.initial[name], expected)
            yield RunDifference(0, f"initial weight {name}", amount, 0.0, record.placements.get(name, ""))


def _measure(record: Record, reference: Record, number: int, tolerance: Tolerance) -> Iterator[RunDifference]:
    """All comparisons of step `number`."""
    step, other = record.steps[number - 1], reference.steps[number - 1]
    allowed_gradient = _allowed_gradient(reference, number, tolerance)
    for what, value, expected, allowed in (
        ("loss", step.loss, other.loss, tolerance.loss),
        ("gradient norm", step.grad_norm, other.grad_norm, allowed_gradient),
    ):
        yield _difference_of_numbers(number, what, value, expected, allowed)
    for name in sorted(step.routing.keys() | other.routing.keys()):
        value, expected = step.routing.get(name, math.nan), other.routing.get(name, math.nan)
        yield _difference_of_numbers(number, name, value, expected, tolerance.loss)
    amounts = gradient_differences(step.gradients, other.gradients)
    for name in reference.initial:  # in model order
        if name not in amounts:
            continue  # frozen in both runs
        yield RunDifference(
            number, f"gradient of {name}", amounts[name], allowed_gradient, record.placements.get(name, "")
        )
    for name, expected_weight in other.weights.items():
        norm = float(np.linalg.norm(expected_weight)) or 1.0
        errors = (
            _allowed_gradient(reference, past, tolerance)
            * max(float(np.linalg.norm(gradients[name])), _term_size(name, gradients))
            for past, gradients in enumerate((step.gradients for step in reference.steps[:number]), start=1)
            if name in gradients  # a frozen weight has none
        )
        allowed = tolerance.weight * number + tolerance.update * sum(errors) / norm
        amount = _relative(step.weights.get(name), expected_weight)
        yield RunDifference(number, f"weight {name}", amount, allowed, record.placements.get(name, ""))


def _difference_of_numbers(number: int, what: str, value: float, expected: float, allowed: float) -> RunDifference:
    amount = abs(value - expected) / abs(expected) if expected else abs(value)
    return RunDifference(number, what, amount, allowed, f"{value!r} instead of {expected!r}")


def _allowed_gradient(reference: Record, number: int, tolerance: Tolerance) -> float:
    """Largest relative difference allowed for a gradient of step `number`.

    Each step adds an error as large as that of the first one. In addition, the errors of earlier gradients have moved
    the weights, by `tolerance.update` times as much, and gradients respond to this.
    """
    past = reference.steps[: number - 1]
    moved = sum(tolerance.update * _norm_of_all(step.gradients) / _norm_of_all(step.weights) for step in past)
    return tolerance.gradient * (number + tolerance.response * moved)


def _norm_of_all(tensors: dict[str, Array]) -> float:
    return math.sqrt(sum(float(np.linalg.norm(tensor)) ** 2 for tensor in tensors.values()))


def gradient_differences(gradients: Mapping[str, Array], expected: Mapping[str, Array]) -> dict[str, float]:
    """L2 norm of each gradient's difference, relative to the size that its rounding errors are relative to.

    It is infinite if only one run has the gradient. A frozen weight has a gradient in neither run, and no entry.
    """
    amounts = {
        name: _relative(gradients.get(name), value, _term_size(name, expected)) for name, value in expected.items()
    }
    return amounts | dict.fromkeys(gradients.keys() - expected.keys(), math.inf)


def _term_size(name: str, gradients: Mapping[str, Array]) -> float:
    """Norm of a bias's gradient without the cancellation of its terms; 0 for other parameters.

    The gradient of a bias is that of its weight for an input of ones, so both have terms of the same size. Those of a
    key bias cancel almost completely: a constant added to all keys shifts all scores of a query equally, which softmax
    ignores. What remains is the rounding of the terms.
    """
    weight = gradients.get(f"{name.removesuffix('.bias')}.weight") if name.endswith(".bias") else None
    if weight is None or weight.ndim < 2:
        return 0.0
    return float(np.linalg.norm(weight)) / math.sqrt(math.prod(weight.shape[1:]))


def _relative(values: Array | None, expected: Array, smallest: float = 0.0) -> float:
    """L2 norm of the difference, relative to that of `expected` or to `smallest`; absolute if both are 0."""
    if values is None or values.shape != expected.shape:
        return math.inf
    difference = float(np.linalg.norm((values - expected).astype(np.float64)))
    return difference / (max(smallest, float(np.linalg.norm(expected.astype(np.float64)))) or 1.0)
