"""The table and the plot of losses by position, from the metrics of runs."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.pages import ROOT

from internlm.utils.errors import DataError

TOOL: dict[str, Any] = runpy.run_path(str(ROOT / "tools" / "loss_by_position.py"))


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, *evaluations: dict[str, float | None]) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        lines = [{"step": step, "loss": 1.0, **values} for step, values in enumerate(evaluations)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return write


def losses(set_name: str = "web", **values: float | None) -> dict[str, float | None]:
    by_positions = {name.removeprefix("at_").replace("_", "-"): value for name, value in values.items()}
    found = {f"val/{set_name}_loss_by_position/{positions}": value for positions, value in by_positions.items()}
    return {f"val/{set_name}_loss": 3.0, **found, f"val/{set_name}_tokens_by_position/0": 7}


def test_the_first_and_the_last_evaluation_of_two_runs(
    write: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    yarn = write("yarn", losses(at_0=5, at_16_31=4, at_8_15=3), {}, losses(at_0=5, at_8_15=2, at_16_31=1))
    short = write("short", losses(at_0=4.5, at_8_15=None))
    plot = tmp_path / "loss.svg"
    assert TOOL["run"]([f"yarn={yarn}", f"short={short}", "--plot", str(plot)]) == 0
    first, last = capsys.readouterr().out.strip().split("\n\n")[1:4:2]
    assert first.splitlines() == [
        "| positions | yarn | short |",
        "|---|---|---|",
        "| 0 | 5.000 | 4.500 |",
        "| 8-15 | 3.000 |  |",
        "| 16-31 | 4.000 |  |",
    ]
    assert last.splitlines()[2:] == ["| 0 | 5.000 | 4.500 |", "| 8-15 | 2.000 |  |", "| 16-31 | 1.000 |  |"]
    assert plot.read_text().startswith("<?xml")


def test_mistakes_are_named(write: Callable[..., Path]) -> None:
    several = write("several", losses("web", at_0=5) | losses("books", at_0=4))
    with pytest.raises(DataError, match=r"several validation sets: web, books; choose one with --set"):
        TOOL["run"]([f"x={several}"])
    with pytest.raises(DataError, match=r"no validation set is named 'code'; there are: web, books"):
        TOOL["run"]([f"x={several}", "--set", "code"])
    assert TOOL["run"]([f"x={several}", "--set", "books"]) == 0
    with pytest.raises(DataError, match=r"set data.valid_by_position = True"):
        TOOL["run"]([f"x={write('without', {'val/web_loss': 3.0})}"])
