"""`metrics.jsonl`: all numbers of a run, one JSON object per step.

Owns the file and its format. An interrupted and resumed run leaves the same lines as an uninterrupted one: on a resume,
lines after the resumed step are moved to `metrics.replaced.jsonl` before new ones are appended.

A line has the names of `MetricsCollector.numbers`, and `val/...` if the step was evaluated; the latter are on a line of
their own if the step was saved before its evaluation. Strict JSON has no NaN or infinity: such a value is null, and
the line gets "nonfinite", a mapping from its name to "nan", "inf" or "-inf".
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from internlm.core.hooks import Hook, RunningTrainer
from internlm.core.step_metrics import StepMetrics
from internlm.monitor.deferred_metrics import SECONDS_AFTER_AN_EXCEPTION, DeferredMetrics
from internlm.monitor.line_writer import LineWriter
from internlm.monitor.metrics_collector import MetricsCollector
from internlm.utils.logging import get_logger

FILE_NAME = "metrics.jsonl"
REPLACED_NAME = "metrics.replaced.jsonl"
"""Lines of steps that are trained again, or that another run wrote into the same run directory."""

logger = get_logger(__name__)


def to_json_line(numbers: dict[str, float | str]) -> str:
    """One line of strict JSON without the line break; for non-finite values see the module."""
    line: dict[str, object] = {}
    nonfinite = {}
    for name, value in numbers.items():
        if isinstance(value, float) and not math.isfinite(value):
            nonfinite[name] = str(value)
            line[name] = None
        elif isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
            # Counts are copied from the device as floats; 4096 reads better than 4096.0.
            line[name] = int(value)
        else:
            line[name] = value
    if nonfinite:
        line["nonfinite"] = nonfinite
    return json.dumps(line, allow_nan=False)


def move_lines_after(path: Path, step: int) -> int:
    """Move the lines of steps after `step` to the file `REPLACED_NAME` in the same folder, atomically.

    A line without a line break, cut off when the process was killed, is moved too.

    Args:
        path: the file of lines.
        step: the last step whose line stays.

    Returns:
        The number of lines moved.
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
    """Appends one line per step to `metrics.jsonl` in the run directory, on the main rank.

    The line of a step is written when the next step starts, so that it includes an evaluation of that step, or at the
    end of the next step if its numbers are not on the host before. A save and the end of the loop write it at once.

    Args:
        collector: shared with the other sinks.
    """

    name = "metrics_file"

    def __init__(self, collector: MetricsCollector) -> None:
        self._deferred = DeferredMetrics(collector)
        self._file: LineWriter | None = None
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
                    "%s: moved %d lines after step %d, the start of this run, to %s", path, moved, step, REPLACED_NAME
                )
        self._evaluation = {}
        self._file = LineWriter(path)

    def on_step_start(self, trainer: RunningTrainer) -> None:
        if self._deferred.has_arrived:
            self._flush()

    def on_step_end(self, trainer: RunningTrainer, metrics: StepMetrics) -> None:
        if self._file is not None:
            self._flush()
            self._deferred.defer(metrics)

    def on_evaluation_end(self, trainer: RunningTrainer, results: dict[str, float]) -> None:
        if self._file is not None:
            # If the line of the step is written already, the evaluation gets a line of its own.
            self._evaluation.update({"step": trainer.state.step, **results})

    def on_save_start(self, trainer: RunningTrainer) -> None:
        # A killed run may resume after this step and would not write its line again.
        self._flush()

    def on_exception(self, trainer: RunningTrainer, error: BaseException) -> None:
        self._deferred.discard_unless_arrived(SECONDS_AFTER_AN_EXCEPTION)
        self._close()

    def on_fit_end(self, trainer: RunningTrainer) -> None:
        self._close()

    def _flush(self) -> None:
        line = {**(self._deferred.pop_numbers() or {}), **self._evaluation}
        if self._file is not None and line:
            self._file.write(to_json_line(line))
        self._evaluation = {}

    def _close(self) -> None:
        self._flush()
        if self._file is not None:
            self._file.close()
            self._file = None
