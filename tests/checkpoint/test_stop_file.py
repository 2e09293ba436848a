"""The stop file: who reads it, what it may hold, and what is done with what it should not."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.fake_trainer import FakeTrainer

from internlm.checkpoint.stop_file import StopFileHook
from internlm.core.hooks import Hook
from internlm.utils.errors import ConfigError


class Write(Hook):
    """Puts texts into a file: by step, before the step starts; None deletes the file."""

    def __init__(self, path: Path, texts: dict[int, str | None]) -> None:
        self.path, self.texts = path, texts

    def on_step_start(self, trainer: FakeTrainer) -> None:  # type: ignore[override]
        step = trainer.state.step + 1
        if step in self.texts:
            text = self.texts[step]
            self.path.unlink() if text is None else self.path.write_text(text)


def requests(path: Path, texts: dict[int, str | None], is_main_rank: bool = True) -> list[int]:
    """What is asked for at each of six steps."""
    trainer = FakeTrainer(path.parent, [Write(path, texts), StopFileHook(path)], 6, is_main_rank=is_main_rank)
    trainer.fit()
    return trainer.asked_at


@contextmanager
def heard(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING, "internlm"):
        patch.setattr(logging.getLogger("internlm"), "propagate", True)
        yield


def test_the_start_writes_zero_over_what_an_earlier_run_left(tmp_path: Path) -> None:
    path = tmp_path / "new" / "stop"
    assert requests(path, {}) == [0] * 6
    assert path.read_text() == "0\n"
    path.write_text("3")
    assert requests(path, {}) == [0] * 6


def test_its_number_is_asked_for_while_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "stop"
    assert requests(path, {2: "5", 4: " -6\n", 6: "0"}) == [0, 5, 5, -6, -6, 0]


def test_what_is_not_a_number_is_told_once_and_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "stop"
    with heard(caplog):
        assert requests(path, {2: "soon", 4: "", 5: "7"}) == [0, 0, 0, 0, 7, 7]
    (message,) = caplog.messages
    assert "contains 'soon', not a step; it is ignored. Write N into it" in message and str(path) in message


def test_a_file_that_cannot_be_read_is_told_once_and_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "stop"
    with heard(caplog):
        assert requests(path, {2: None, 5: "7"}) == [0, 0, 0, 0, 7, 7]
    (message,) = caplog.messages
    assert "cannot be read" in message


def test_only_the_main_rank_touches_it(tmp_path: Path) -> None:
    assert requests(tmp_path / "stop", {}, is_main_rank=False) == []
    assert not (tmp_path / "stop").exists()


def test_a_place_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ckpt.stop_file_path = '.*' cannot be written: .*; set another file"):
        requests(tmp_path, {})
