"""The numbers of a step are copied while the next step runs, and only those of a failed step are lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.fake_trainer import FakeTrainer
from helpers.slow_device import SlowDevice
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import internlm.monitor.metrics_file as metrics_file
from internlm.core.hooks import Hook
from internlm.eval.hook import EvaluationHook
from internlm.monitor.deferred_metrics import DeferredMetrics
from internlm.monitor.metrics_collector import MetricsCollector
from internlm.monitor.metrics_file import MetricsFileHook
from internlm.monitor.tensorboard import TensorBoardHook


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


class Watch(Hook):
    """Notes after each step what is on file, and what the host has waited for."""

    def __init__(self, device: SlowDevice) -> None:
        self.device = device
        self.on_file: list[list[int]] = []
        self.waited: list[list[int]] = []

    def on_step_counted(self, trainer: Any) -> None:
        self.on_file.append([line["step"] for line in lines_of(trainer.run_dir)])
        self.waited.append(list(self.device.waited))


def test_a_step_is_waited_for_when_the_next_one_is_queued(tmp_path: Path) -> None:
    device, collector = SlowDevice(), MetricsCollector()
    watch = Watch(device)
    hooks = [MetricsFileHook(collector), TensorBoardHook(collector), watch]
    FakeTrainer(tmp_path, hooks, metrics=device.metrics).fit()
    assert watch.waited == watch.on_file == [[], [1], [1, 2], [1, 2, 3]]
    assert device.waited == [1, 2, 3, 4]  # once each, for both
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3, 4]
    events = EventAccumulator(str(tmp_path / "tensorboards")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]


def test_a_step_that_has_come_is_not_waited_for(tmp_path: Path) -> None:
    device = SlowDevice()
    device.arrived = {1, 2, 3, 4}
    watch = Watch(device)
    FakeTrainer(tmp_path, [MetricsFileHook(MetricsCollector()), watch], metrics=device.metrics).fit()
    assert device.waited == []
    assert watch.on_file == [[], [1], [1, 2], [1, 2, 3]]


def test_an_evaluation_stays_on_the_line_of_its_step(tmp_path: Path) -> None:
    FakeTrainer(tmp_path, [MetricsFileHook(MetricsCollector()), EvaluationHook(2)], metrics=SlowDevice().metrics).fit()
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert ["val/books_loss" in line for line in lines] == [False, True, False, True]


def test_what_a_save_comes_after_is_on_file(tmp_path: Path) -> None:
    class SaveAt(Hook):
        def on_step_counted(self, trainer: Any) -> None:
            if trainer.state.step == 2:
                trainer.save_checkpoint()
                self.on_file = [line["step"] for line in lines_of(trainer.run_dir)]

    save = SaveAt()
    FakeTrainer(tmp_path, [MetricsFileHook(MetricsCollector()), save], metrics=SlowDevice().metrics).fit()
    assert save.on_file == [1, 2]


def run_that_fails(folder: Path, device: SlowDevice) -> list[int]:
    collector = MetricsCollector()
    hooks = [MetricsFileHook(collector), TensorBoardHook(collector)]
    with pytest.raises(RuntimeError, match="on purpose"):
        FakeTrainer(folder, hooks, metrics=device.metrics).fit(fail_at=4)
    steps = [line["step"] for line in lines_of(folder)]
    events = EventAccumulator(str(folder / "tensorboards")).Reload()
    assert [event.step for event in events.Scalars("loss")] == steps
    return steps


def test_a_failure_loses_no_step_that_the_device_has_done(tmp_path: Path) -> None:
    device = SlowDevice()
    device.arrived = {3}
    assert run_that_fails(tmp_path, device) == [1, 2, 3]


def test_a_device_that_hangs_or_has_failed_costs_its_last_step_and_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_file, "SECONDS_AFTER_AN_EXCEPTION", 0.05)
    monkeypatch.setattr("internlm.monitor.tensorboard.SECONDS_AFTER_AN_EXCEPTION", 0.05)
    hanging = SlowDevice()
    assert run_that_fails(tmp_path / "hangs", hanging) == [1, 2]
    assert hanging.waited == [1, 2]

    failing = SlowDevice()

    class Fail(Hook):
        def on_step_start(self, trainer: Any) -> None:
            failing.fails = trainer.state.step == 3

    collector = MetricsCollector()
    with pytest.raises(RuntimeError):
        FakeTrainer(tmp_path / "fails", [Fail(), MetricsFileHook(collector)], metrics=failing.metrics).fit(fail_at=4)
    assert [line["step"] for line in lines_of(tmp_path / "fails")] == [1, 2]


def test_the_rates_of_a_deferred_step_are_those_of_that_step() -> None:
    device = SlowDevice()
    times = iter([0.0, 0.25, 1.0, 1.5])
    collector = MetricsCollector(clock=lambda: next(times))
    deferred = DeferredMetrics(collector)
    first, second = device.metrics(1), device.metrics(2, num_tokens=3000)
    deferred.defer(first)
    assert not deferred.has_arrived
    collector.count(second)
    one = deferred.pop_numbers()
    assert one is not None and deferred.pop_numbers() is None and deferred.has_arrived
    assert one["loss"] == 10.0 and one["total_time"] == 0.5 and one["tgs"] == one["tgs/tgs_all"] == 2000.0
    deferred.defer(second)
    two = deferred.pop_numbers()
    # Of the two waits, the first one was in the second step.
    assert two is not None and two["total_time"] == 0.5 + 0.25 + 0.5 and two["tgs"] == 3000 / 1.25
    assert two["tgs/tgs_all"] == pytest.approx(4000 / (0.5 + 1.25))


def test_a_step_shown_at_once_is_read_once(tmp_path: Path) -> None:
    """The console reads a step that the metrics file has deferred."""
    device = SlowDevice()
    collector = MetricsCollector()
    deferred = DeferredMetrics(collector)
    first, second = device.metrics(1), device.metrics(2)
    deferred.defer(first)
    collector.count(second)
    shown = collector.numbers(second)
    device.waited.clear()
    assert deferred.pop_numbers() is not None
    deferred.defer(second)
    assert deferred.pop_numbers() == shown
    assert device.waited == [1]
