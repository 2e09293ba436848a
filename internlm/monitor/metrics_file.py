"""`metrics.jsonl`: all numbers of a run, one JSON object a step.

Owns the file and its format. The file is a function of the run, however often the run was interrupted: on a resume
the lines after the resumed step are moved to `metrics.replaced.jsonl` before new ones are appended.

A line holds the names of `StepNumbers.of`, and `val/...` where that step was evaluated; these have a line of their own
where the step was saved before. It is strict JSON, which has no NaN or infinity: such a value is null, and the line
gets "nonfinite", a mapping of its name to "nan", "inf" or "-inf".
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from internlm.core.hooks import Hook, RunningTrainer
from internlm.core.step_metrics import StepMetrics
from internlm.monitor.appended_lines import AppendedLines
from internlm.monitor.step_numbers import SECONDS_AFTER_AN_EXCEPTION, HeldStep, StepNumbers
from internlm.utils.logging import get_logger

FILE_NAME = "metrics.jsonl"
REPLACED_NAME = "metrics.replaced.jsonl"
"""Lines of steps that are trained anew, or that another run wrote into the same run directory."""

logger = get_logger(__name__)


def to_json_line(numbers: dict[str, float | str]) -> str:
    """One line of strict JSON without the line end; see the module for values that are not finite."""
    line: dict[str, object] = {}
    nonfinite = {}
    for name, value in numbers.items():
        if isinstance(value, float) and not math.isfinite(value):
            nonfinite[name] = str(value)
            line[name] = None
        elif isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
            # Counts that come from the device are floats there; 4096 reads better than 4096.0.
            line[name] = int(value)
        else:
            line[name] = value
    if nonfinite:
        line["nonfinite"] = nonfinite
    return json.dumps(line, allow_nan=False)


def move_lines_after(path: Path, step: int) -> int:
    """Keep only the whole lines of steps up to `step`, and append the others to `REPLACED_NAME` beside the file.

    A line cut short by a kill is no whole line, and goes too. The file is replaced in one go.

    Returns:
        How many lines went.
    """
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _step_of(line) <= step]
    moved = [line for line in lines if _step_of(line) > step]
    if moved:
        with path.with_name(REPLACED_NAME).open("ab") as replaced:
            replaced.writelines(line if line.endswith(b"\n") else line + b"\n" for line in moved)
        replacement = path.with_suffix(".tmp")
        replacement.write_bytes(b"".join(kept))
        os.replace(replacement, path)
    return len(moved)


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


class MetricsFileHook(Hook):
    """Appends a line a step to `metrics.jsonl` in the run directory; only the main rank writes.

    The line of a step is written when its numbers have come from the device and the next step has started, so that an
    evaluation of that step is on the same line; at the latest at the end of the next step, when a save begins or when
    the loop ends. It is flushed at once.
    """

    name = "metrics_file"

    def __init__(self, numbers: StepNumbers) -> None:
        self._held = HeldStep(numbers)
        self._file: AppendedLines | None = None
        self._evaluation: dict[str, float | str] = {}

    def on_fit_start(self, trainer: RunningTrainer) -> None:
        if not trainer.is_main_rank:
            return
        path = trainer.run_dir / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            step = trainer.state.step
            moved = move_lines_after(path, step)
            if moved:
                logger.info(
                    "%s: %d lines after step %d, where this run starts, are in %s", path, moved, step, REPLACED_NAME
                )
        self._evaluation = {}
        self._file = AppendedLines(path)

    def on_step_start(self, trainer: RunningTrainer) -> None:
        if self._held.has_arrived:
            self._flush()

    def on_step_end(self, trainer: RunningTrainer, metrics: StepMetrics) -> None:
        if self._file is not None:
            self._flush()
            self._held.hold(metrics)

    def on_evaluation_end(self, trainer: RunningTrainer, results: dict[str, float]) -> None:
        if self._file is not None:
            # An evaluation whose step is already on file gets a line of its own.
            self._evaluation.update({"step": trainer.state.step, **results})

    def on_save_start(self, trainer: RunningTrainer) -> None:
        # A run killed later may go on after this step, so its line has to be on file.
        self._flush()

    def on_exception(self, trainer: RunningTrainer, error: BaseException) -> None:
        self._held.drop_unless_it_arrives(SECONDS_AFTER_AN_EXCEPTION)
        self._close()

    def on_fit_end(self, trainer: RunningTrainer) -> None:
        self._close()

    def _flush(self) -> None:
        line = {**(self._held.take() or {}), **self._evaluation}
        if self._file is not None and line:
            self._file.write(to_json_line(line))
        self._evaluation = {}

    def _close(self) -> None:
        self._flush()
        if self._file is not None:
            self._file.close()
            self._file = None
