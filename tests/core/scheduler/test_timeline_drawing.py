"""Timelines as text and as images."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from internlm.core.scheduler.schedules import make_schedule
from internlm.core.scheduler.simulator import simulate
from internlm.core.scheduler.timeline_drawing import draw_png, draw_text
from internlm.utils.errors import UserError


def test_a_column_is_a_unit_of_time() -> None:
    assert draw_text(simulate(make_schedule("1F1B", 2, 2))) == (
        "rank 0  F0 F1       B0---    B1---\n"
        "rank 1     F0 B0--- F1 B1---"
    )  # fmt: skip
    rows = draw_text(simulate(make_schedule("ZBV", 2, 1, 2))).splitlines()
    assert rows[1] == "rank 1      F0a F0b         I0b W0b I0a W0a"


def test_a_long_step_is_shown_by_its_ends() -> None:
    timeline = simulate(make_schedule("ZBH1", 3, 40))
    whole = draw_text(timeline).splitlines()
    for width in (40, 61, 62, 63, 100):
        rows = draw_text(timeline, width=width).splitlines()
        assert max(map(len, rows)) <= width < max(map(len, whole))
        for short, full in zip(rows, whole, strict=True):
            left, right = short.split(" .. ")
            assert full.startswith(left.rstrip()) and full.endswith(right.lstrip())
    assert draw_text(timeline, width=10_000).splitlines() == whole


def test_a_deep_pipeline_is_shown_by_its_ends() -> None:
    rows = draw_text(simulate(make_schedule("1F1B", 40, 40)), width=80, max_ranks=4).splitlines()
    assert [row.split()[:2] for row in rows] == [["rank", "0"], ["rank", "1"], [".."], ["rank", "38"], ["rank", "39"]]


def test_an_image_needs_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timeline = simulate(make_schedule("DUALPIPEV", 3, 6, 2))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        draw_png(timeline, tmp_path / "pipeline.png")
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    draw_png(timeline, tmp_path / "pipeline.png")
    assert (tmp_path / "pipeline.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"nowhere/pipeline.png: the image cannot be written: No such file"):
        draw_png(timeline, tmp_path / "nowhere" / "pipeline.png")
