"""Throughput and the one flat mapping of a step's numbers."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.fake_trainer import step_metrics

from internlm.core.step_metrics import StepMetrics
from internlm.monitor.internevo_line import internevo_line
from internlm.monitor.step_numbers import FlopsModel, StepNumbers, Throughput


def test_rates_over_sixty_uneven_steps():
    tokens = [1000 * (1 + step % 3) for step in range(60)]
    seconds = [0.5 + 0.1 * (step % 4) for step in range(60)]
    throughput = Throughput(world_size=4)
    for pair in zip(tokens, seconds, strict=True):
        throughput.add(*pair)
    numbers = throughput.numbers()
    rates = [t / 4 / s for t, s in zip(tokens, seconds, strict=True)]
    assert numbers["tgs"] == numbers["tgs/last_tgs_1"] == rates[-1]
    assert numbers["tgs/last_tgs_10"] == pytest.approx(sum(tokens[-10:]) / 4 / sum(seconds[-10:]))
    assert numbers["tgs/last_tgs_50"] == pytest.approx(sum(tokens[-50:]) / 4 / sum(seconds[-50:]))
    assert numbers["tgs/tgs_SMA"] == pytest.approx(sum(rates[-50:]) / 50)
    assert numbers["tgs/tgs_all"] == pytest.approx(sum(tokens) / 4 / sum(seconds))
    assert numbers["tgs/tgs_avg"] == pytest.approx(sum(rates) / 60)
    assert throughput.seconds_per_step() == pytest.approx(sum(seconds[-50:]) / 50)


def test_all_rates_are_those_of_one_rank():
    numbers = StepNumbers(Throughput(world_size=4), clock=lambda: 0.0).of(step_metrics(1))
    assert (numbers["tgs"], numbers["real_tgs"]) == (500.0, 450.0)
    assert " real_tgs=450.0 tgs (tokens/gpu/second)=500.0 tgs/last_tgs_1=500.0 " in internevo_line(numbers)


def test_tflops_and_mfu_name_their_convention():
    flops = FlopsModel(full=60e9, causal=50e9, peak=1e15)
    throughput = Throughput(world_size=2, flops=flops)
    throughput.add(40_000, 2.0)  # 10,000 tokens per second on each of two ranks
    numbers = throughput.numbers()
    assert (numbers["tflops"], numbers["tflops_full"]) == pytest.approx((500.0, 600.0))
    assert (numbers["mfu"], numbers["mfu_full"]) == pytest.approx((0.5, 0.6))
    assert "causal" in numbers["mfu_convention"] and "1000 TFLOP/s" in numbers["mfu_convention"]

    throughput = Throughput(world_size=2, flops=FlopsModel(full=60e9, causal=50e9, peak=1e15, convention="full"))
    throughput.add(40_000, 2.0)
    numbers = throughput.numbers()
    assert (numbers["tflops"], numbers["tflops_causal"]) == pytest.approx((600.0, 500.0))
    assert numbers["mfu_convention"].startswith("full")


def test_no_mfu_without_a_known_peak():
    throughput = Throughput(flops=FlopsModel(full=6e6, causal=5e6))
    throughput.add(1000, 1.0)
    numbers = throughput.numbers()
    assert numbers["tflops"] == pytest.approx(0.005)
    assert not {"mfu", "mfu_full"} & numbers.keys()
    assert "tflops" not in _numbers_without_flops()


def _numbers_without_flops():
    throughput = Throughput()
    throughput.add(1000, 1.0)
    return throughput.numbers()


def test_the_device_is_waited_for_once_a_step(monkeypatch):
    waits = []
    original = StepMetrics.numbers
    monkeypatch.setattr(StepMetrics, "numbers", lambda self: waits.append(self.step) or original(self))
    numbers = StepNumbers(Throughput(world_size=2), clock=lambda: 0.0)
    first = step_metrics(1)
    numbers.count(first)
    assert waits == []
    one, two = numbers.of(first), numbers.of(first)
    assert waits == [1] and one == two
    one["tgs"] = 0.0  # a sink may change what it got
    assert numbers.of(first) == two
    assert two["tgs"] == 1000.0 and two["real_tgs"] == 900.0  # 1000 tokens, 900 valid, 2 ranks, 0.5 s
    assert two["fwd_bwd_time"] == 0.4
    # Neither the wait nor the three calls counted the step again.
    assert numbers.throughput.seconds_per_step() == 0.5 and numbers.throughput.numbers()["tgs/tgs_all"] == 1000.0


def test_the_wait_for_the_device_belongs_to_the_step():
    times = iter([10.0, 10.25, 20.0, 20.5])
    numbers = StepNumbers(clock=lambda: next(times))
    first, second, third = step_metrics(1), step_metrics(2), step_metrics(3)
    numbers.count(first)
    one = numbers.of(first)  # queued in 0.5 s, waited for 0.25 s
    assert one["total_time"] == 0.75 and one["tgs"] == 1000 / 0.75 and one["real_tgs"] == 900 / 0.75
    numbers.count(second)  # not waited for: its work is in the wait of the next one
    three = numbers.of(third)
    assert three["total_time"] == 1.0
    assert three["tgs/tgs_all"] == three["tgs/last_tgs_10"] == pytest.approx(3000 / (0.75 + 0.5 + 1.0))
    assert three["tgs/tgs_avg"] == three["tgs/tgs_SMA"] == pytest.approx((1000 / 0.75 + 2000 + 1000) / 3)


def test_a_type_without_tokens_is_left_out():
    extra = {
        "loss/en": torch.tensor(2.0),
        "acc/en": torch.tensor(0.5),
        "tokens/en": torch.tensor(900.0),
        "loss/code": torch.tensor(math.nan),
        "acc/code": torch.tensor(math.nan),
        "tokens/code": torch.tensor(0.0),
    }
    numbers = StepNumbers().of(step_metrics(1, extra=extra))
    assert numbers["loss/en"] == 2.0 and numbers["tokens/code"] == 0.0
    assert not {"loss/code", "acc/code"} & numbers.keys()
