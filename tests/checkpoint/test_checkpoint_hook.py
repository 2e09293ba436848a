"""When the checkpoint hook saves, and what it says of what came of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.fake_trainer import FakeTrainer

from internlm.checkpoint.hook import CheckpointHook
from internlm.core.hooks import Hook, SaveResult
from internlm.utils.errors import CheckpointError
from internlm.utils.storage import storage_path


class Saves(FakeTrainer):
    """Notes what is saved; a save ends `steps_late` steps after it began, those at the steps of `failing` badly.

    Args:
        failing: step -> how many saves at this step fail.
    """

    def __init__(
        self, folder: Path, hooks: list[Hook], total_steps: int, failing: dict[int, int], steps_late: int = 0
    ) -> None:
        super().__init__(folder, hooks, total_steps)
        self.saved: list[str] = []
        self.drained = 0.0
        self.failing = dict(failing)
        self.steps_late = steps_late
        self._under_way: list[SaveResult] = []
        self._newest: SaveResult | None = None

    def save_checkpoint(self, *, snapshot: bool = False) -> None:
        step = self.state.step
        self.saved.append(f"{step}{'s' if snapshot else ''}")
        fails = self.failing.get(step, 0) > 0
        self.failing[step] = self.failing.get(step, 0) - 1
        path = storage_path(self.run_dir / str(step))
        self._newest = SaveResult(step, path, snapshot, 0.25, 1.5, "no space" if fails else None)
        self._under_way.append(self._newest)

    def poll_saves(self) -> list[SaveResult]:
        ended = [result for result in self._under_way if self.state.step >= result.step + self.steps_late]
        self._under_way = [result for result in self._under_way if result not in ended]
        return ended

    def finish_saving(self) -> None:
        self.steps_late = 0
        if self._newest is not None and self._newest.error is not None:
            raise CheckpointError(f"the last one: {self._newest.error}")

    def drain_saves(self, seconds: float) -> None:
        self.steps_late, self.drained = 0, seconds


class AskAt(Hook):
    """Someone asks for a save, or a stop, at these steps."""

    def __init__(self, save: int = 0, stop: int = 0) -> None:
        self.save, self.stop = save, stop

    def on_step_end(self, trainer: FakeTrainer, metrics: object) -> None:  # type: ignore[override]
        trainer.save_reason = "someone asked" if trainer.state.step == self.save else None
        if trainer.state.step == self.stop:
            trainer.stop_reason = "someone asked"


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.LogCaptureFixture]:
    monkeypatch.setattr(logging.getLogger("internlm"), "propagate", True)
    with caplog.at_level(logging.INFO, "internlm"):
        yield caplog


def run(
    folder: Path,
    total_steps: int,
    every: int,
    snapshot_every: int | None = None,
    failing: dict[int, int] | None = None,
    steps_late: int = 0,
    asked: AskAt | None = None,
) -> Saves:
    hooks: list[Hook] = [asked or AskAt(), CheckpointHook(every, snapshot_every)]
    trainer = Saves(folder, hooks, total_steps, failing or {}, steps_late)
    trainer.fit()
    return trainer


def test_checkpoints_are_due_by_number_and_at_the_end(tmp_path: Path) -> None:
    assert run(tmp_path, 7, 3).saved == ["3", "6", "7"]
    assert run(tmp_path, 6, 3).saved == ["3", "6"]


def test_snapshots_are_taken_where_no_checkpoint_is_due(tmp_path: Path) -> None:
    assert run(tmp_path, 9, 4, 2).saved == ["2s", "4", "6s", "8", "9"]
    # The last step gets a checkpoint, not a snapshot and then a checkpoint.
    assert run(tmp_path, 6, 4, 2).saved == ["2s", "4", "6"]
    assert run(tmp_path, 9, 4, 2, asked=AskAt(stop=6)).saved == ["2s", "4", "6"]


def test_what_someone_asks_for_is_saved_once(tmp_path: Path, told: pytest.LogCaptureFixture) -> None:
    assert run(tmp_path, 9, 4, asked=AskAt(save=5)).saved == ["4", "5", "8", "9"]
    assert "step 5: saving a checkpoint: someone asked" in told.messages
    assert run(tmp_path, 9, 4, asked=AskAt(save=4)).saved == ["4", "8", "9"]
    assert run(tmp_path, 9, 4, 5, asked=AskAt(save=5)).saved == ["4", "5", "8", "9"]


def test_a_resumed_run_that_does_nothing_saves_nothing(tmp_path: Path) -> None:
    assert run(tmp_path, 0, 4).saved == []


@pytest.mark.parametrize("steps_late", [0, 2])
def test_a_complete_one_is_told_with_its_times(tmp_path: Path, told: pytest.LogCaptureFixture, steps_late: int) -> None:
    run(tmp_path, 5, 4, 2, steps_late=steps_late)
    assert told.messages == [
        f"step 2: saved snapshot {tmp_path}/2 (stalled 0.250 s, written in 1.500 s)",
        f"step 4: saved checkpoint {tmp_path}/4 (stalled 0.250 s, written in 1.500 s)",
        f"step 5: saved checkpoint {tmp_path}/5 (stalled 0.250 s, written in 1.500 s)",
    ]


@pytest.mark.parametrize("steps_late", [0, 1])
def test_failures_are_alerts_and_the_run_goes_on(
    tmp_path: Path, told: pytest.LogCaptureFixture, steps_late: int
) -> None:
    trainer = run(tmp_path, 10, 2, failing={2: 1, 6: 1, 8: 1}, steps_late=steps_late)
    assert trainer.saved == ["2", "4", "6", "8", "10"]
    assert [record.getMessage() for record in told.records if record.levelno == logging.ERROR] == [
        "step 2: the checkpoint could not be saved: no space; this run has no complete one yet; the run continues",
        f"step 6: the checkpoint could not be saved: no space; the newest complete one is {tmp_path}/4; "
        "the run continues",
        "step 8: the checkpoint could not be saved (2 failures in a row): no space; the newest complete one is "
        f"{tmp_path}/4; the run continues",
    ]


def test_the_checkpoint_that_the_run_goes_on_from_is_the_newest_at_first(
    tmp_path: Path, told: pytest.LogCaptureFixture
) -> None:
    trainer = Saves(tmp_path, [CheckpointHook(2)], 4, {2: 1})
    trainer.resumed_from = "/data/100"
    trainer.fit()
    assert "the newest complete one is /data/100; the run continues" in told.messages[0]


@pytest.mark.parametrize("total_steps", [6, 7])
def test_the_last_one_is_tried_twice(tmp_path: Path, told: pytest.LogCaptureFixture, total_steps: int) -> None:
    trainer = run(tmp_path, total_steps, 3, failing={total_steps: 1})
    assert trainer.saved == ["3", "6", "6"] if total_steps == 6 else ["3", "6", "7", "7"]
    assert f"step {total_steps}: the run ends here, so the failed save is retried once" in told.messages
    assert told.messages[-1].startswith(f"step {total_steps}: saved checkpoint")


@pytest.mark.parametrize("steps_late", [0, 1])
def test_a_last_one_that_fails_twice_is_an_error(
    tmp_path: Path, told: pytest.LogCaptureFixture, steps_late: int
) -> None:
    with pytest.raises(CheckpointError, match="the run ended at step 7, but the last one: no space"):
        run(tmp_path, 7, 3, failing={7: 2}, steps_late=steps_late)
    assert "(2 failures in a row): no space; the newest complete one" in told.messages[-1]
    assert told.messages[-1].endswith(f"one is {tmp_path}/6")


def test_a_failure_that_is_made_good_later_is_no_error(tmp_path: Path) -> None:
    assert run(tmp_path, 8, 3, failing={6: 1}).saved == ["3", "6", "8"]


def test_an_exception_waits_for_what_is_being_written(tmp_path: Path, told: pytest.LogCaptureFixture) -> None:
    trainer = Saves(tmp_path, [CheckpointHook(2)], 6, {}, steps_late=5)
    with pytest.raises(RuntimeError, match="failed on purpose"):
        trainer.fit(fail_at=4)
    assert 0 < trainer.drained <= 600
    assert told.messages == [f"step 2: saved checkpoint {tmp_path}/2 (stalled 0.250 s, written in 1.500 s)"]


def test_an_interrupt_does_not_wait(tmp_path: Path) -> None:
    trainer = Saves(tmp_path, [], 6, {}, steps_late=5)
    CheckpointHook(2).on_exception(trainer, KeyboardInterrupt())  # type: ignore[arg-type]
    assert trainer.drained == 0


def test_a_failure_while_waiting_does_not_hide_the_cause(tmp_path: Path, told: pytest.LogCaptureFixture) -> None:
    trainer = Saves(tmp_path, [CheckpointHook(2)], 6, {}, steps_late=5)
    trainer.drain_saves = lambda seconds: 1 / 0  # type: ignore[assignment,method-assign,return-value]
    with pytest.raises(RuntimeError, match="failed on purpose"):
        trainer.fit(fail_at=4)
    assert "waiting for the save in the background failed" in told.messages
