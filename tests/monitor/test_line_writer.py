"""Lines appended to a file on a disk that is temporarily full."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.full_disk import no_file_larger_than

from internlm.monitor import line_writer
from internlm.monitor.line_writer import LineWriter


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.LogCaptureFixture]:
    monkeypatch.setattr(logging.getLogger("internlm"), "propagate", True)
    with caplog.at_level(logging.INFO, "internlm"):
        yield caplog


def test_lines_wait_and_are_whole(tmp_path: Path, told: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("before\n")
    lines = LineWriter(path)
    lines.write("a")
    with no_file_larger_than(14):
        for number in range(3):
            lines.write(f"{number}" * 10)
        assert path.read_text() == "before\na\n"
    (error,) = told.messages
    assert error == (
        f"cannot write '{path}': file too large; free space on that disk (or in your quota), or choose another folder; "
        "lines wait in memory, and the run continues"
    )
    lines.write("b")
    lines.close()
    assert path.read_text() == "before\na\n0000000000\n1111111111\n2222222222\nb\n"
    assert "can be written again" in told.messages[-1]


def test_what_is_lost_is_counted(
    tmp_path: Path, told: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_writer, "MAX_WAITING", 2)
    path = tmp_path / "metrics.jsonl"
    lines = LineWriter(path)
    with no_file_larger_than(1):
        for number in range(5):
            lines.write(f"line {number}")
        lines.close()
    assert told.messages[-1] == f"{path}: 5 lines could not be written and are lost"
