"""The flat mapping of the numbers of a step."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.fake_trainer import step_metrics

from internlm.core.step_metrics import StepMetrics
from internlm.monitor.internevo_line import internevo_line
from internlm.monitor.metrics_collector import MetricsCollector
from internlm.monitor.throughput import Throughput


def test_all_rates_are_those_of_one_rank():
    numbers = MetricsCollector(Throughput(world_size=4), clock=lambda: 0.0).numbers(step_metrics(1))
    assert (numbers["tgs"], numbers["real_tgs"]) == (500.0, 450.0)
    assert " real_tgs=450.0 tgs (tokens/gpu/second)=500.0 tgs/last_tgs_1=500.0 " in internevo_line(numbers)


def test_the_device_is_waited_for_once_a_step(monkeypatch):
    waits = []
    original = StepMetrics.numbers
    monkeypatch.setattr(StepMetrics, "numbers", lambda self: waits.append(self.step) or original(self))
    collector = MetricsCollector(Throughput(world_size=2), clock=lambda: 0.0)
    first = step_metrics(1)
    collector.count(first)
    assert waits == []
    one, two = collector.numbers(first), collector.numbers(first)
    assert waits == [1] and one == two
    one["tgs"] = 0.0  # a sink may change what it got
    assert collector.numbers(first) == two
    assert two["tgs"] == 1000.0 and two["real_tgs"] == 900.0  # 1000 tokens, 900 valid, 2 ranks, 0.5 s
    assert two["fwd_bwd_time"] == 0.4
    # Neither the wait nor the three calls counted the step again.
    assert collector.throughput.seconds_per_step() == 0.5 and collector.throughput.rates()["tgs/tgs_all"] == 1000.0


def test_the_wait_for_the_device_belongs_to_the_step():
    times = iter([10.0, 10.25, 20.0, 20.5])
    collector = MetricsCollector(clock=lambda: next(times))
    first, second, third = step_metrics(1), step_metrics(2), step_metrics(3)
    collector.count(first)
    one = collector.numbers(first)  # queued in 0.5 s, waited for 0.25 s
    assert one["total_time"] == 0.75 and one["tgs"] == 1000 / 0.75 and one["real_tgs"] == 900 / 0.75
    collector.count(second)  # not waited for: its work is in the wait of the next one
    three = collector.numbers(third)
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
    numbers = MetricsCollector().numbers(step_metrics(1, extra=extra))
    assert numbers["loss/en"] == 2.0 and numbers["tokens/code"] == 0.0
    assert not {"loss/code", "acc/code"} & numbers.keys()
