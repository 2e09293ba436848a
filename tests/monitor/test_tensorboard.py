"""TensorBoard scalars, read back with tensorboard's own reader."""

from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path

import pytest
from helpers.fake_trainer import FakeTrainer, step_metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from internlm.eval.hook import EvaluationHook
from internlm.monitor.metrics_collector import MetricsCollector
from internlm.monitor.tensorboard import TensorBoardHook
from internlm.monitor.throughput import FlopsModel, Throughput
from internlm.utils.logging import ROOT_LOGGER


@pytest.fixture(autouse=True)
def _files_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of one second and one process are read in the order of their numbers as text, in which 10 is before 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def read(folder) -> EventAccumulator:
    return EventAccumulator(str(folder)).Reload()


def points(events: EventAccumulator, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_every_number_of_every_step(tmp_path):
    collector = MetricsCollector(Throughput(flops=FlopsModel(full=2e9, causal=1e9)))
    FakeTrainer(tmp_path, [TensorBoardHook(collector), EvaluationHook(2)], total_steps=4).fit()
    events = read(tmp_path / "tensorboards")
    assert points(events, "loss") == [(1, 10.0), (2, 5.0), (3, 3.3333332538604736), (4, 2.5)]
    assert points(events, "val/books_loss") == [(2, 2.5), (4, 2.5)]
    assert {"tgs/tgs_SMA", "tflops", "grad_norm"} <= set(events.Tags()["scalars"])


def test_a_resume_purges_what_came_after(tmp_path):
    def metrics(offset):
        return lambda step: step_metrics(step, loss=offset + step_metrics(step).loss)

    FakeTrainer(tmp_path, [TensorBoardHook(MetricsCollector())], 5, metrics=metrics(100)).fit()
    FakeTrainer(tmp_path, [TensorBoardHook(MetricsCollector())], 6, start=2, metrics=metrics(0)).fit()
    assert [(step, value > 100) for step, value in points(read(tmp_path / "tensorboards"), "loss")] == [
        (1, True),
        (2, True),
        (3, False),
        (4, False),
        (5, False),
        (6, False),
    ]


def test_folders(tmp_path):
    FakeTrainer(tmp_path / "run", [TensorBoardHook(MetricsCollector(), folder=tmp_path / "chosen")]).fit()
    hook = TensorBoardHook(MetricsCollector(), folder=tmp_path / "unused", resume_folder=tmp_path / "chosen")
    FakeTrainer(tmp_path / "run", [hook], total_steps=6, start=4).fit()
    assert [step for step, _ in points(read(tmp_path / "chosen"), "loss")] == [1, 2, 3, 4, 5, 6]
    assert not (tmp_path / "unused").exists() and not (tmp_path / "run").exists()


def test_a_resumed_run_goes_on_in_the_folder_of_the_run_before(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger(ROOT_LOGGER), "propagate", True)
    caplog.set_level(logging.INFO, ROOT_LOGGER)
    first = TensorBoardHook(MetricsCollector())
    FakeTrainer(tmp_path / "first", [first], total_steps=2).fit()
    state = first.state_dict()

    def resume(run: str, resumed_from: str | None = "ckpt/2", folder: Path | None = None) -> dict:
        hook = TensorBoardHook(MetricsCollector(), folder)
        hook.load_state_dict(state)
        trainer = FakeTrainer(tmp_path / run, [hook], total_steps=4, start=2)
        trainer.resumed_from = resumed_from
        trainer.fit()
        return hook.state_dict()

    assert resume("second") == state
    assert [step for step, _ in points(read(tmp_path / "first" / "tensorboards"), "loss")] == [1, 2, 3, 4]
    assert not (tmp_path / "second").exists()
    assert f"TensorBoard: continuing in {tmp_path}/first/tensorboards, like the resumed run" in caplog.text
    # Who chooses a folder gets it, who branches off gets one of his own, and what is gone is told.
    assert resume("third", folder=tmp_path / "chosen") == {"folder": str(tmp_path / "chosen")}
    assert resume("fourth", resumed_from=None) == {"folder": str(tmp_path / "fourth" / "tensorboards")}
    shutil.rmtree(tmp_path / "first")
    assert resume("fifth") == {"folder": str(tmp_path / "fifth" / "tensorboards")}
    assert f"cannot write to {tmp_path}/first/tensorboards of the resumed run" in caplog.text


def test_a_missing_package_is_one_named_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger(ROOT_LOGGER).addHandler(handler)
    try:
        FakeTrainer(tmp_path, [TensorBoardHook(MetricsCollector()), EvaluationHook(2)]).fit()
    finally:
        logging.getLogger(ROOT_LOGGER).removeHandler(handler)
    assert len(lines) == 1 and "pip install tensorboard" in lines[0]


def test_only_the_main_rank_writes(tmp_path):
    FakeTrainer(tmp_path, [TensorBoardHook(MetricsCollector())], is_main_rank=False).fit()
    assert list(tmp_path.iterdir()) == []
