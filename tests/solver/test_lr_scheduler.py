"""The learning-rate shapes against those of transformers, and the parts that transformers does not have."""

from __future__ import annotations

import pytest
import torch
from transformers import optimization

from internlm.solver.lr_scheduler import LearningRateSchedule
from internlm.utils.errors import ConfigError

BASE = 3e-4
TOTAL = 200
DECAY = 50
# Both sides compute in float64 with a handful of operations in another order.
TOLERANCE = {"rel": 1e-13, "abs": 1e-19}


def transformers_rates(shape: str, warmup: int, eta_min: float) -> list[float]:
    """The learning rate that a schedule of transformers sets before each of TOTAL + 1 optimizer steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=BASE)
    if shape == "cosine":
        scheduler = optimization.get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup, TOTAL, min_lr=eta_min)
    elif shape == "linear":
        # A polynomial of degree 1 is the line that may end above 0.
        scheduler = optimization.get_polynomial_decay_schedule_with_warmup(
            optimizer, warmup, TOTAL, lr_end=eta_min, power=1.0
        )
    elif shape == "wsd":
        scheduler = optimization.get_wsd_schedule(
            optimizer, warmup, DECAY, TOTAL, decay_type="linear", min_lr_ratio=eta_min / BASE
        )
    else:
        scheduler = optimization.get_constant_schedule_with_warmup(optimizer, warmup)
    rates = []
    for _ in range(TOTAL + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def make(shape: str, **fields) -> LearningRateSchedule:
    return LearningRateSchedule(**{"shape": shape, "base_lr": BASE, "total_steps": TOTAL, **fields})


@pytest.mark.parametrize("shape", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize("eta_min", [0.0, 3e-5])
def test_without_warmup_every_step_equals_transformers(shape, eta_min):
    schedule = make(shape, eta_min=eta_min, decay_ratio=DECAY / TOTAL)
    rates = [schedule.lr(step) for step in range(TOTAL + 1)]
    assert rates == pytest.approx(transformers_rates(shape, 0, eta_min), **TOLERANCE)


@pytest.mark.parametrize("shape", ["cosine", "linear", "wsd", "constant"])
def test_with_warmup_equals_transformers(shape):
    warmup = 20
    schedule = make(shape, warmup_ratio=warmup / TOTAL, decay_ratio=DECAY / TOTAL)
    theirs = transformers_rates(shape, warmup, 0.0)
    # The warm-up of transformers spends its first step at rate 0; ours is one step ahead.
    assert [schedule.lr(step) for step in range(warmup)] == pytest.approx(theirs[1 : warmup + 1], **TOLERANCE)
    after = [schedule.lr(step) for step in range(warmup, TOTAL + 1)]
    assert after == pytest.approx(theirs[warmup:], **TOLERANCE)


def test_init_steps_are_zeros_before_the_warmup():
    schedule = make("cosine", total_steps=100, init_steps=10, warmup_ratio=0.2, eta_min=1e-5)
    assert [schedule.lr(step) for step in range(10)] == [0.0] * 10
    assert [schedule.lr(step) for step in range(10, 30)] == pytest.approx([BASE * n / 20 for n in range(1, 21)])
    assert schedule.lr(30) == BASE  # the decay begins where the warm-up ended
    assert BASE > schedule.lr(31) > schedule.lr(65) > schedule.lr(99) > 1e-5
    assert schedule.lr(65) == pytest.approx((BASE + 1e-5) / 2)  # half of the cosine, 35 of 70 steps
    assert schedule.lr(100) == schedule.lr(10_000) == pytest.approx(1e-5)  # and it stays there


def test_wsd_is_stable_until_the_last_steps():
    schedule = make("wsd", init_steps=10, warmup_ratio=0.1, decay_ratio=0.25, eta_min=1e-5)
    assert {schedule.lr(step) for step in range(30, 151)} == {BASE}
    drops = [schedule.lr(step) - schedule.lr(step + 1) for step in range(150, 200)]
    assert drops == pytest.approx([(BASE - 1e-5) / 50] * 50)


def test_last_epoch_starts_in_the_middle():
    whole, rest = make("cosine", warmup_ratio=0.1), make("cosine", warmup_ratio=0.1, last_epoch=49)
    assert [rest.lr(step) for step in range(150)] == [whole.lr(step) for step in range(50, 200)]


def test_ratio_is_not_hurt_by_floating_point():
    assert 0.29 * 100 < 29  # what the product is
    assert make("cosine", total_steps=100, warmup_ratio=0.29).warmup_steps == 29


def test_all_mistakes_are_told_at_once():
    with pytest.raises(ConfigError) as error:
        LearningRateSchedule(
            "cosin", base_lr=-1.0, total_steps=0, init_steps=-1, warmup_ratio=1.5, decay_ratio=-0.1, last_epoch=-2
        )
    text = str(error.value)
    assert "Did you mean 'cosine'?" in text
    for key in ("adam.lr", "total_steps", "init_steps", "warmup_ratio", "decay_ratio", "last_epoch"):
        assert key in text


@pytest.mark.parametrize(
    "fields",
    [{"init_steps": 150, "warmup_ratio": 0.5}, {"shape": "wsd", "warmup_ratio": 0.6, "decay_ratio": 0.5}],
)
def test_phases_that_do_not_fit_are_refused(fields):
    with pytest.raises(ConfigError, match="do not fit in total_steps = 200"):
        make(**{"shape": "cosine", **fields})


def test_eta_min_above_the_base_rate_lets_it_grow():
    schedule = make("linear", total_steps=10, eta_min=3 * BASE)
    assert [schedule.lr(step) for step in (0, 5, 10, 11)] == pytest.approx([BASE, 2 * BASE, 3 * BASE, 3 * BASE])


def test_rates_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match="eta_min"):
        make("cosine", eta_min=-BASE)
    with pytest.raises(ConfigError, match=r"adam\.lr"):
        make("cosine", base_lr=float("nan"))
