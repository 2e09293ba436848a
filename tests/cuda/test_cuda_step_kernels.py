"""Own Triton kernels of an optimizer step on a GPU: exact accumulation, and AdamW in one pass with the bits of fp32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.optim.adamw import adamw

from internlm.solver.optimizer.rules.adamw import AdamW
from internlm.solver.optimizer.rules.update_rule import UpdateStep
from internlm.utils.triton_support import why_no_triton

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DEVICE = torch.device("cuda")
BF16 = torch.bfloat16
HYPER = {"lr": 1e-3, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}


@pytest.fixture(autouse=True)
def _has_triton() -> None:
    if (reason := why_no_triton(DEVICE)) is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("numel", [0, 1, 1023, 100_001])
@pytest.mark.parametrize("source", [BF16, torch.float16, torch.float32])
@pytest.mark.parametrize("target", [BF16, torch.float32])
def test_gradients_are_accumulated_as_by_pytorch(target: torch.dtype, source: torch.dtype, numel: int) -> None:
    from internlm.solver.optimizer.triton_kernels import accumulate

    whole = torch.randn(numel + 64, device=DEVICE).to(target)
    before, gradient = whole.clone(), torch.randn(numel, device=DEVICE).to(source)
    accumulate(whole[32 : 32 + numel], gradient, adds=True)
    expected = before.clone()
    expected[32 : 32 + numel].add_(gradient)
    assert torch.equal(whole, expected)
    accumulate(whole[32 : 32 + numel], gradient, adds=False)
    expected[32 : 32 + numel].copy_(gradient)
    assert torch.equal(whole, expected)


def _states(numel: int) -> list[Tensor]:
    """Weights, gradient and both moments."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    weights, gradient, mean = (torch.randn(numel, device=DEVICE, generator=generator) for _ in range(3))
    return [weights, gradient * 1e-2, mean * 1e-2, torch.rand(numel, device=DEVICE, generator=generator) * 1e-4]


def _in_one_pass(states: list[Tensor], number: int, rounded: Tensor | None, skipped: float = 0.0) -> None:
    weights, gradient, mean, square = states
    scalars = (torch.tensor(value, device=DEVICE) for value in (float(number), 1.5, skipped))
    step = UpdateStep(HYPER, *scalars)
    AdamW().update_and_round(weights, gradient, {"exp_avg": mean, "exp_avg_sq": square}, step, rounded)


@pytest.mark.parametrize("gradient_dtype", [BF16, torch.float32])
@pytest.mark.parametrize("number", [0, 3, 10_000])
def test_adamw_is_the_formula(number: int, gradient_dtype: torch.dtype) -> None:
    """The first moment is within two units of the last place of its larger term, the second within four of its sum,
    weights within one of theirs and eight of the update; the weights are rounded to nearest."""
    numel = 100_001
    found = _states(numel)
    found[1] = found[1].to(gradient_dtype)
    exact = [tensor.double() for tensor in found]
    before, gradient = found[0].clone(), found[1].clone()
    rounded = torch.full((numel + 1,), 7.0, dtype=BF16, device=DEVICE)
    _in_one_pass(found, number, rounded[:numel])
    own = torch.tensor(float(number), dtype=torch.float64, device=DEVICE)
    adamw(
        [exact[0]],
        [exact[1] / 1.5],
        [exact[2]],
        [exact[3]],
        [],
        [own],
        fused=False,
        foreach=False,
        amsgrad=False,
        maximize=False,
        **HYPER,
    )
    unit = 2**-23
    assert torch.equal(found[1], gradient)
    scale = exact[2].abs() + gradient.double().abs()
    assert ((found[2] - exact[2]).abs() <= 2 * unit * scale).all()
    assert ((found[3] - exact[3]).abs() <= 4 * unit * (exact[3] + gradient.double().square())).all()
    # A moment near zero, the difference of larger terms, is less exact than they are, and so is its update.
    update = HYPER["lr"] * (scale / exact[3].sqrt() * 4 + 1)
    assert ((found[0] - exact[0]).abs() <= unit * before.abs() + 8 * unit * update).all()
    assert torch.equal(rounded[:numel], found[0].to(BF16)) and rounded[numel] == 7.0


def test_a_skipped_update_writes_nothing() -> None:
    states = _states(5000)
    states[1][7] = torch.inf
    before = [tensor.clone() for tensor in states]
    rounded = torch.zeros(5000, dtype=BF16, device=DEVICE)
    _in_one_pass(states, 3, rounded, skipped=1.0)
    assert all(map(torch.equal, states, before)) and not rounded.any()


def test_the_division_into_parts_changes_no_bit() -> None:
    """Parts at any multiple of the buckets' alignment."""
    whole, parts = _states(5000), _states(5000)
    _in_one_pass(whole, 3, None)
    for start, stop in ((0, 32), (32, 1024), (1024, 2080), (2080, 5000)):
        _in_one_pass([tensor[start:stop] for tensor in parts], 3, None)
    assert all(map(torch.equal, whole, parts))
