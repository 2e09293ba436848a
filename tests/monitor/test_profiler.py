"""The trace of one step."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.fake_trainer import FakeTrainer

from internlm.core.hooks import Hook
from internlm.monitor.profiler import ProfilerHook


class Work(Hook):
    """Marks each step in the profile."""

    def on_step_start(self, trainer):
        with torch.profiler.record_function(f"work of step {trainer.state.step + 1}"):
            torch.ones(4) + 1


def marks(path) -> set[str]:
    events = json.loads(path.read_text())["traceEvents"]
    return {event["name"] for event in events if event["name"].startswith("work of")}


def test_the_third_step_is_recorded(tmp_path):
    FakeTrainer(tmp_path, [ProfilerHook(), Work()], total_steps=15, start=10).fit()
    assert [path.name for path in (tmp_path / "traces").iterdir()] == ["step_13.json"]
    assert marks(tmp_path / "traces" / "step_13.json") == {"work of step 13"}


@pytest.mark.parametrize("total_steps", [1, 2])
def test_a_run_too_short_writes_nothing(tmp_path, total_steps):
    FakeTrainer(tmp_path, [ProfilerHook(), Work()], total_steps=total_steps).fit()
    assert not (tmp_path / "traces").exists()


@pytest.mark.parametrize("fail_at", [1, 2, 3, 4])
def test_an_exception_passes(tmp_path, fail_at):
    with pytest.raises(RuntimeError, match="on purpose"):
        FakeTrainer(tmp_path, [ProfilerHook(), Work()]).fit(fail_at)


def test_only_the_main_rank_records(tmp_path):
    FakeTrainer(tmp_path, [ProfilerHook()], is_main_rank=False).fit()
    assert list(tmp_path.iterdir()) == []
