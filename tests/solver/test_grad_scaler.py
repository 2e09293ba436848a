"""The dynamic loss scale against a few lines of plain Python, over random overflows."""

from __future__ import annotations

import json
import random

import pytest
import torch

from internlm.solver.grad_scaler import ConstantGradScaler, DynamicGradScaler
from internlm.utils.errors import CheckpointError, ConfigError


class PlainScale:
    """The rule in Python numbers and branches."""

    def __init__(self, initial, low, high, growth, backoff, interval, hysteresis):
        self.scale, self.low, self.high = initial, low, high
        self.growth, self.backoff, self.interval, self.hysteresis = growth, backoff, interval, hysteresis
        self.row = 0
        self.overflows = 0

    def update(self, overflow: bool) -> None:
        if overflow:
            self.row = 0
            self.overflows += 1
            if self.overflows >= self.hysteresis:
                self.scale = max(self.low, self.scale * self.backoff)
            return
        self.row += 1
        if self.row == self.interval:
            self.row = self.overflows = 0
            self.scale = min(self.high, self.scale * self.growth)


@pytest.mark.parametrize("overflow_rate", [0.02, 0.2, 0.6])
@pytest.mark.parametrize("interval, hysteresis", [(1, 1), (3, 2), (5, 3), (4, 0)])
def test_equals_the_plain_rule(overflow_rate, interval, hysteresis):
    arguments = (2.0**6, 1.0, 2.0**10, 2.0, 0.5, interval, hysteresis)
    ours, plain = DynamicGradScaler(*arguments), PlainScale(*arguments)
    rng = random.Random(f"{overflow_rate} {interval} {hysteresis}")
    seen = set()
    for _ in range(300):
        overflow = rng.random() < overflow_rate
        ours.update(torch.tensor(float(overflow)))
        plain.update(overflow)
        assert ours.scale.item() == plain.scale
        seen.add(plain.scale)
    assert len(seen) > 1  # the scale did move


def test_no_step_waits_for_the_device():
    # A meta tensor has no value: any .item() or branch on it raises.
    scaler = DynamicGradScaler(device="meta")
    scaler.update(torch.zeros((), device="meta"))
    assert scaler.scale.is_meta


def test_a_step_in_flight_keeps_its_scale():
    scaler = DynamicGradScaler(initial_scale=4.0, hysteresis=1)
    before = scaler.scale
    scaler.update(torch.tensor(1.0))
    assert (before.item(), scaler.scale.item()) == (4.0, 2.0)


def test_state_continues_exactly():
    def run(scaler, pattern):
        scales = []
        for overflow in pattern:
            scaler.update(torch.tensor(overflow))
            scales.append(scaler.scale.item())
        return scales

    pattern = [0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    arguments = {"initial_scale": 64.0, "growth_interval": 3, "hysteresis": 2}
    whole = run(DynamicGradScaler(**arguments), pattern)
    for cut in range(len(pattern)):
        first = DynamicGradScaler(**arguments)
        run(first, pattern[:cut])
        second = DynamicGradScaler(**arguments)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert run(second, pattern[cut:]) == whole[cut:]


def test_constant_scale_never_moves_and_saves_nothing():
    scaler = ConstantGradScaler()
    scaler.update(torch.tensor(1.0))
    assert scaler.scale.item() == 1.0 and scaler.scale.dtype == torch.float32
    assert scaler.state_dict() == {}
    dynamic = DynamicGradScaler(initial_scale=8.0)
    dynamic.load_state_dict(scaler.state_dict())  # a bf16 run continued in fp16 starts with its configured scale
    assert dynamic.scale.item() == 8.0


def test_mistakes_are_told_at_once():
    with pytest.raises(ConfigError) as error:
        DynamicGradScaler(0.5, 1.0, 2.0, 0.5, 1.5, 0, -1)
    assert len(error.value.mistakes) == 5
    with pytest.raises(CheckpointError, match="clean_steps"):
        DynamicGradScaler().load_state_dict({"scale": 1.0, "overflows": 0})
