"""Throughput over windows of steps."""

from __future__ import annotations

import pytest

from internlm.monitor.throughput import FlopsModel, Throughput


def test_rates_over_sixty_uneven_steps():
    tokens = [1000 * (1 + step % 3) for step in range(60)]
    seconds = [0.5 + 0.1 * (step % 4) for step in range(60)]
    throughput = Throughput(world_size=4)
    for pair in zip(tokens, seconds, strict=True):
        throughput.add(*pair)
    numbers = throughput.rates()
    rates = [t / 4 / s for t, s in zip(tokens, seconds, strict=True)]
    assert numbers["tgs"] == numbers["tgs/last_tgs_1"] == rates[-1]
    assert numbers["tgs/last_tgs_10"] == pytest.approx(sum(tokens[-10:]) / 4 / sum(seconds[-10:]))
    assert numbers["tgs/last_tgs_50"] == pytest.approx(sum(tokens[-50:]) / 4 / sum(seconds[-50:]))
    assert numbers["tgs/tgs_SMA"] == pytest.approx(sum(rates[-50:]) / 50)
    assert numbers["tgs/tgs_all"] == pytest.approx(sum(tokens) / 4 / sum(seconds))
    assert numbers["tgs/tgs_avg"] == pytest.approx(sum(rates) / 60)
    assert throughput.seconds_per_step() == pytest.approx(sum(seconds[-50:]) / 50)


def test_tflops_and_mfu_name_their_convention():
    flops = FlopsModel(full=60e9, causal=50e9, peak=1e15)
    throughput = Throughput(world_size=2, flops=flops)
    throughput.add(40_000, 2.0)  # 10,000 tokens per second on each of two ranks
    numbers = throughput.rates()
    assert (numbers["tflops"], numbers["tflops_full"]) == pytest.approx((500.0, 600.0))
    assert (numbers["mfu"], numbers["mfu_full"]) == pytest.approx((0.5, 0.6))
    assert "causal" in numbers["mfu_convention"] and "1000 TFLOP/s" in numbers["mfu_convention"]

    throughput = Throughput(world_size=2, flops=FlopsModel(full=60e9, causal=50e9, peak=1e15, convention="full"))
    throughput.add(40_000, 2.0)
    numbers = throughput.rates()
    assert (numbers["tflops"], numbers["tflops_causal"]) == pytest.approx((600.0, 500.0))
    assert numbers["mfu_convention"].startswith("full")


def test_flops_of_pictures_are_added_to_those_of_tokens():
    throughput = Throughput(world_size=2, flops=FlopsModel(full=60e9, causal=50e9, per_picture=1e12))
    throughput.add(40_000, 2.0, num_pictures=100)  # 25 pictures per second on each of two ranks
    assert throughput.rates()["tflops"] == pytest.approx(500.0 + 25.0)
    throughput.add(40_000, 2.0)
    assert throughput.rates()["tflops"] == pytest.approx(500.0)


def test_no_mfu_without_a_known_peak():
    throughput = Throughput(flops=FlopsModel(full=6e6, causal=5e6))
    throughput.add(1000, 1.0)
    numbers = throughput.rates()
    assert numbers["tflops"] == pytest.approx(0.005)
    assert not {"mfu", "mfu_full"} & numbers.keys()
    assert "tflops" not in _rates_without_flops()


def _rates_without_flops():
    throughput = Throughput()
    throughput.add(1000, 1.0)
    return throughput.rates()
