"""Curves of a metrics file that grows, is cut, is replaced, and goes back."""

from __future__ import annotations

import json
import math
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from internlm.monitor import metrics_curves
from internlm.monitor.bucketed_curve import MAX_BUCKETS
from internlm.monitor.metrics_curves import MetricsCurves
from internlm.monitor.metrics_file import move_lines_after, to_json_line
from internlm.utils.json_text import json_object


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def append(path: Path, *lines: dict[str, Any] | str) -> None:
    with path.open("a") as file:
        file.writelines(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)


def read(curves: MetricsCurves) -> dict[str, Any]:
    while not curves.update():
        pass
    return curves.view(["loss"])


def loss_of(view: dict[str, Any]) -> dict[int, float | None]:
    points = view["curves"].get("loss", {"mean": []})
    return dict(zip(view["steps"], points["mean"], strict=False))


def test_only_whole_lines_are_read_and_only_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    curves = MetricsCurves(path)
    assert read(curves)["steps"] == [] and curves.is_missing
    append(path, {"step": 1, "loss": 4.0}, {"step": 2, "loss": 3.0}, '{"step": 3, "lo')
    view = read(curves)
    assert loss_of(view) == {1: 4.0, 2: 3.0} and not curves.is_missing
    parsed = []
    monkeypatch.setattr(metrics_curves, "json_object", lambda line: parsed.append(line) or json_object(line))
    append(path, 'ss": 2.5}\n')
    assert loss_of(read(curves)) == {1: 4.0, 2: 3.0, 3: 2.5}
    assert parsed == [b'{"step": 3, "loss": 2.5}\n']
    assert curves.version == view["version"] and not curves.num_unreadable


def test_a_page_gets_what_is_new(path: Path) -> None:
    curves = MetricsCurves(path)
    append(path, *({"step": step, "loss": step} for step in range(1, 6)))
    version = read(curves)["version"]
    append(path, {"step": 5, "val/loss": 1.0}, {"step": 6, "loss": 6})
    curves.update()
    news = curves.view(["loss", "val/loss", "absent"], version, start=4)
    assert (news["first"], news["steps"]) == (4, [5, 6])
    assert news["curves"] == {"loss": {"mean": [5, 6]}, "val/loss": {"mean": [1.0, None]}}
    assert news["names"] == ["loss", "val/loss"] and news["newest"]["val/loss"] == [5, 1.0]
    assert curves.view(["loss"], version - 1, start=4)["first"] == 0


def test_numbers_that_are_not_finite_are_gaps_and_counted(path: Path) -> None:
    lines = [
        to_json_line({"step": 1, "loss": math.nan}),
        to_json_line({"step": 2, "loss": -math.inf}),
        to_json_line({"step": 3, "loss": 2.0, "mfu_convention": "causal"}),
        '{"step": 4, "loss": NaN}',
        '{"step": 5, "loss": 1' + "0" * 400 + "}",
        '{"step": 6, "loss": null}',
    ]
    append(path, *(line + "\n" for line in lines))
    view = read(MetricsCurves(path))
    assert loss_of(view) == {1: None, 2: None, 3: 2.0, 4: None, 5: None, 6: None}
    assert view["nonfinite"] == {"loss": {"nan": 3, "-inf": 1, "inf": 1}}
    assert view["newest"]["loss"] == [6, "nan"] and view["texts"] == {"mfu_convention": "causal"}
    json.dumps(view, allow_nan=False)


def test_lines_of_another_kind_are_counted(path: Path) -> None:
    steps = ['"x"', "-1", "1.5", "true", "1e300", "null"]
    bad = ["7", "[]", "{}", "\x00", *(f'{{"step": {step}}}' for step in steps)]
    append(path, *(line + "\n" for line in bad), "[" * 100_000 + "\n", {"step": 1, "loss": 2.0})
    curves = MetricsCurves(path)
    assert loss_of(read(curves)) == {1: 2.0}
    assert curves.num_unreadable == len(bad) + 1


def test_a_line_longer_than_is_read_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_curves, "READ_BYTES", 64)
    append(path, {"step": 1, "loss": 2.0}, "x" * 1000 + "\n", {"step": 2, "loss": 1.0})
    curves = MetricsCurves(path)
    assert loss_of(read(curves)) == {1: 2.0, 2: 1.0} and curves.num_unreadable == 1


def test_a_resumed_run_moves_lines_and_the_curve_follows(path: Path) -> None:
    """As `MetricsFileHook` does it: the file is replaced by a shorter one."""
    curves = MetricsCurves(path)
    append(path, *({"step": step, "loss": 1.0} for step in range(1, 101)))
    read(curves)
    assert move_lines_after(path, 60) == 40
    append(path, *({"step": step, "loss": 2.0} for step in range(61, 131)))
    assert loss_of(read(curves)) == {step: 1.0 if step <= 60 else 2.0 for step in range(1, 131)}
    assert curves.num_restarts == 1 and not curves.num_superseded


@pytest.mark.parametrize("way", ["cut", "rewritten", "removed"])
def test_a_file_that_starts_anew_is_noticed(path: Path, way: str) -> None:
    curves = MetricsCurves(path)
    append(path, *({"step": step, "loss": 1.0} for step in range(1, 11)))
    version = read(curves)["version"]
    # Nothing has come in between.
    assert read(curves)["version"] == version
    if way == "removed":
        path.unlink()
        assert read(curves)["steps"] == [] and curves.is_missing
    lines = [{"step": step, "loss": 2.0} for step in range(1, 4 if way == "cut" else 40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    view = read(curves)
    assert set(loss_of(view).values()) == {2.0} and len(view["steps"]) == len(lines)
    assert view["version"] != version and curves.num_restarts == 1


def test_steps_that_are_trained_again_show_their_last_numbers(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a plain implementation, for files that go back at random, read in pieces of random sizes."""
    generator = random.Random(1)
    for _ in range(60):
        path.unlink(missing_ok=True)
        monkeypatch.setattr(metrics_curves, "READ_BYTES", generator.choice([60, 500, 1 << 20]))
        curves = MetricsCurves(path)
        expected: dict[int, float] = {}
        step, num_lines = generator.randrange(5), 0
        for _ in range(generator.randrange(1, 6)):
            for _ in range(generator.randrange(1, 12)):
                if generator.random() < 0.15:
                    step = generator.randrange(step + 1)
                value = float(generator.randrange(100))
                append(path, {"step": step, "loss": value})
                num_lines += 1
                expected = {each: known for each, known in expected.items() if each < step} | {step: value}
                step += generator.choice([1, 1, 1, 2])
            view = read(curves)
            found = {each: mean for each, mean in loss_of(view).items() if mean is not None}
            assert found == expected
            assert curves.num_superseded == num_lines - len(expected)


def test_other_numbers_of_the_step_to_which_a_run_goes_back_stay(path: Path) -> None:
    append(path, {"step": 2, "loss": 3.0}, {"step": 2, "val": 4.0}, {"step": 3, "loss": 2.0, "val": 3.0})
    append(path, {"step": 2, "loss": 2.5})
    curves = MetricsCurves(path)
    read(curves)
    assert curves.view(["loss", "val"])["curves"] == {"loss": {"mean": [2.5]}, "val": {"mean": [4.0]}}


def test_nothing_is_left_of_a_number_that_is_written_again(path: Path) -> None:
    """Neither in the extremes of its bucket, nor among the numbers that are not finite."""
    append(path, {"step": 0, "loss": 1.0}, {"step": MAX_BUCKETS, "loss": 90.0}, {"step": MAX_BUCKETS, "loss": 0.5})
    append(path, {"step": MAX_BUCKETS, "loss": 5.0}, {"step": MAX_BUCKETS + 1, "loss": math.nan})
    append(path, {"step": MAX_BUCKETS + 1, "loss": 3.0})
    curves = MetricsCurves(path)
    view = read(curves)
    last = {name: points[-1] for name, points in view["curves"]["loss"].items()}
    assert last == {"mean": 4.0, "low": 3.0, "high": 5.0}
    assert view["width"] == 2 and view["nonfinite"] == {} and curves.num_superseded == 3


def test_a_long_run_has_few_points_with_its_extremes(path: Path) -> None:
    values = [math.sin(step) for step in range(20_000)]
    values[7_777] = 50.0
    append(path, *({"step": step, "loss": value} for step, value in enumerate(values)))
    view = read(MetricsCurves(path))
    assert view["width"] == 16 and len(view["steps"]) == 1250 <= MAX_BUCKETS
    points = view["curves"]["loss"]
    for bucket, step in enumerate(view["steps"]):
        own = values[step : step + 16]
        assert points["mean"][bucket] == pytest.approx(sum(own) / len(own), abs=1e-12)
        assert (points["low"][bucket], points["high"][bucket]) == (min(own), max(own))


def test_memory_is_bounded(path: Path) -> None:
    curves = MetricsCurves(path)
    tracemalloc.start()
    try:
        sizes = []
        for part in range(4):
            append(path, *({"step": step, "loss": 1.0} for step in range(part * 4_000, (part + 1) * 4_000)))
            read(curves)
            sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert sizes[3] < sizes[0] + 50_000 and sizes[3] < 400_000


def test_too_many_names_are_counted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_curves, "MAX_NAMES", 2)
    append(path, {"step": 1, "a": 1, "b": 2, "c": 3, "d": 4, "e": "text", "f": "text", "g": "text"})
    curves = MetricsCurves(path)
    assert read(curves)["names"] == ["a", "b"] and curves.num_names_omitted == 2
    assert list(curves.view([])["texts"]) == ["e", "f"]
