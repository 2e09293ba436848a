"""bf16 moments are right on average, the same in any layout, and near those of AdamW in double precision."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.parameter_events import deliver_gradient
from internlm.core.parallel.shard_spec import Box, ShardSpec, attach_shard_spec
from internlm.solver.optimizer.hybrid_zero import HybridZeroOptimizer
from internlm.solver.optimizer.rules.adamw import AdamW
from internlm.solver.optimizer.state_form import StateForm
from internlm.solver.optimizer.stochastic_rounding import StochasticRounding, store_truncated

SHAPE = (300, 400)
CPU = torch.device("cpu")

DEVIATIONS = 5
"""Standard deviations that a mean may be off: that a good source is further off happens once in 1.7 million times."""


def noise_of(update: int, box: Box, key: str = "exp_avg/w", shape: tuple[int, ...] = SHAPE) -> Tensor:
    """The random numbers of a box, as fractions of the distance between two neighbours in bf16."""
    noise = StochasticRounding([shape], CPU)
    noise.draw(torch.tensor(float(update)))
    bits = torch.zeros(box.size, dtype=torch.int32)
    noise.add(bits, box, key)
    return bits / 2.0**16


def whole(shape: tuple[int, ...] = SHAPE) -> Box:
    return Box((0,) * len(shape), (0,) * len(shape), shape)


def rounded(values: Tensor, update: int) -> Tensor:
    """fp32 `values` of the whole tensor, rounded to bf16 and back."""
    noise = StochasticRounding([tuple(values.shape)], CPU)
    noise.draw(torch.tensor(float(update)))
    values, target = values.clone(), torch.empty(values.numel(), dtype=torch.bfloat16)
    noise.add(values.view(torch.int32), whole(tuple(values.shape)), "exp_avg/w")
    store_truncated(target, values.view(-1))
    return target.view(values.shape).float()


@pytest.mark.parametrize("update", range(4))
def test_the_numbers_are_uniform(update: int) -> None:
    noise = noise_of(update, whole())
    assert noise.min() >= 0 and noise.max() < 1
    # Elements of a row share a number: the deviation of a share p is that of pairwise independent ones all the same.
    for share in (0.01, 0.25, 0.5, 0.9):
        deviation = math.sqrt(share * (1 - share) / noise.numel())
        assert abs(float((noise < share).double().mean()) - share) <= DEVIATIONS * deviation


def test_the_numbers_of_two_elements_are_independent() -> None:
    """Neighbours, other rows, the next update, the other moment, another tensor: correlations as of random numbers."""
    num_updates, size = 60, 100
    sums: dict[str, float] = {}
    for update in range(num_updates):
        box = whole((size, size))
        noise = noise_of(update, box)
        pairs = {
            "right": (noise[:, :-1], noise[:, 1:]),
            "below": (noise[:-1], noise[1:]),
            "diagonal": (noise[:-1, :-1], noise[1:, 1:]),
            "far": (noise[:50, :50], noise[50:, 50:]),
            "next update": (noise, noise_of(update + 1, box)),
            "other moment": (noise, noise_of(update, box, "exp_avg_sq/w")),
            "other tensor": (noise, noise_of(update, box, "exp_avg/v")),
        }
        for name, (one, other) in pairs.items():
            sums[name] = sums.get(name, 0.0) + float(((one - 0.5) * (other - 0.5)).double().mean()) * 12
    # Each product has variance 1/144. Those of two columns may be alike in all rows of an update, but no two columns
    # have them in common: half as many columns or rows, times updates, are at least so many independent numbers.
    for name, total in sums.items():
        assert abs(total / num_updates) <= DEVIATIONS / math.sqrt(num_updates * size / 2), name


@pytest.mark.parametrize("shape", [(), (7,), (6, 5), (3, 4, 5)])
def test_an_element_gets_its_number_in_any_layout(shape: tuple[int, ...]) -> None:
    """Boxes of a tensor get the numbers that the whole one has there, also when longer tensors are beside it."""
    full = noise_of(3, whole(shape), shape=shape)
    assert full.shape == shape
    for start in range(shape[0] if shape else 0):
        size = (1, *(extent - 1 for extent in shape[1:]))
        box = Box((start, *[1] * (len(shape) - 1)), (0,) * len(shape), size)
        assert torch.equal(noise_of(3, box, shape=shape), full[box.global_slices()])
    beside = StochasticRounding([shape, (50, 60, 2)], CPU)
    beside.draw(torch.tensor(3.0))
    bits = torch.zeros(shape, dtype=torch.int32)
    beside.add(bits, whole(shape), "exp_avg/w")
    assert torch.equal(bits / 2.0**16, full)


def test_rounding_is_right_on_average() -> None:
    """Of any sign and size; what bf16 holds stays as it is."""
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) ** 3
    exact = values.bfloat16().float()
    assert torch.equal(rounded(exact, 1), exact)
    assert torch.equal(rounded(torch.zeros(SHAPE), 1), torch.zeros(SHAPE))
    lower = (values.view(torch.int32) & ~0xFFFF).view(torch.float32)
    upper = ((values.view(torch.int32) | 0xFFFF) + 1).view(torch.float32)
    fraction = ((values - lower) / (upper - lower)).double()
    ups = torch.zeros(SHAPE, dtype=torch.float64)
    for update in range(20):
        found = rounded(values, update)
        is_up = found == upper
        assert (is_up | (found == lower)).all()
        ups += is_up
    deviation = math.sqrt(float((fraction * (1 - fraction)).sum()) / 20) / values.numel()
    assert abs(float((ups / 20 - fraction).mean())) <= DEVIATIONS * deviation


# -- in the optimizer -----------------------------------------------------------------------------------------------


def optimizer_of(shape: tuple[int, ...], beta2: float) -> tuple[nn.Parameter, HybridZeroOptimizer]:
    weight = nn.Parameter(torch.ones(shape))
    attach_shard_spec(weight, ShardSpec.whole("w", weight.shape))
    module = nn.Module()
    module.register_parameter("w", weight)
    form = StateForm(moments=torch.bfloat16)
    rule = AdamW((0.9, beta2))
    optimizer = HybridZeroOptimizer(module, ParallelContext.create(), rule=rule, weight_decay=0.1, form=form)
    return weight, optimizer


def take_step(weight: nn.Parameter, optimizer: HybridZeroOptimizer, gradient: Tensor, lr: float = 1e-3) -> None:
    optimizer.begin_step(1)
    deliver_gradient(weight, gradient)
    optimizer.step(lr)


def test_a_second_moment_falls_as_slowly_as_it_should() -> None:
    """With beta2 = 0.999 a step takes 0.001 of it, which rounding to the nearest of 8 bits would never do."""
    num_steps, beta2 = 100, 0.999
    weight, optimizer = optimizer_of(SHAPE, beta2)
    take_step(weight, optimizer, torch.ones(SHAPE))
    moment = optimizer.states[0].tensors["exp_avg_sq"]
    first = moment.float().double().max()
    assert first * beta2 == pytest.approx(float((first * beta2).bfloat16()), rel=2**-8)
    for _ in range(num_steps):
        take_step(weight, optimizer, torch.zeros(SHAPE))
    values = moment[: weight.numel()].double()
    expected = (1 - beta2) * beta2**num_steps
    # Each of the roundings has a variance below a quarter of the squared distance of neighbours, 2**-7 of the value.
    deviation = 0.5 * 2**-7 * (1 - beta2) * math.sqrt((num_steps + 1) / values.numel())
    assert abs(float(values.mean()) - expected) <= DEVIATIONS * deviation
    # Had it stayed where it was, it would be this far off.
    assert (1 - beta2) - expected > 100 * DEVIATIONS * deviation


@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_moments_in_bf16_stay_near_adamw_in_double_precision(beta2: float) -> None:
    """Every weight is within the errors of all roundings, added up at their worst."""
    beta1, decay, eps, lr = 0.9, 0.1, 1e-8, 1e-3
    weight, optimizer = optimizer_of((40, 50), beta2)
    exact = torch.ones(40, 50, dtype=torch.float64)
    m, v, error_m, error_v, error_w = (torch.zeros_like(exact) for _ in range(5))
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 11):
        gradient = torch.randn(40, 50, generator=generator) + 0.5
        take_step(weight, optimizer, gradient, lr)
        wide = gradient.double()
        m, v = beta1 * m + (1 - beta1) * wide, beta2 * v + (1 - beta2) * wide**2
        error_m, error_v = beta1 * error_m, beta2 * error_v
        size = (m / (1 - beta1**step)).abs()

        def root(moment: Tensor, step: int = step) -> Tensor:
            return (moment.clamp(min=0) / (1 - beta2**step)).sqrt() + eps

        low, high = root(v - error_v), root(v + error_v)
        error_of_update = error_m / (1 - beta1**step) / low + size * torch.maximum(
            1 / low - 1 / root(v), 1 / root(v) - 1 / high
        )
        exact = exact * (1 - lr * decay) - lr * m / (1 - beta1**step) / root(v)
        # Weights near 1 are rounded to fp32 three times a step.
        error_w = error_w + lr * error_of_update + 3 * 2**-24
        assert ((weight.detach().double() - exact).abs() <= error_w).all()
        # Kept with 8 bits: off by less than the distance of neighbours, at most 2**-7 of the value.
        error_m, error_v = error_m + 2**-7 * (m.abs() + error_m), error_v + 2**-7 * (v + error_v)
    # What is allowed would not hide a moment that is lost or taken twice: that moves weights by about lr.
    assert float(error_w.median()) < 10 * lr / 4
