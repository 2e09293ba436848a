"""Shows the progress of a run: a progress bar on a terminal, otherwise a log line every few steps.

Owns the wording and rounding of the numbers, not the numbers.
"""

from __future__ import annotations

import datetime
import logging
import math
import sys
from collections.abc import Mapping
from typing import Literal, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from internlm.core.hooks import Hook, RunningTrainer
from internlm.core.step_metrics import StepMetrics
from internlm.monitor.internevo_line import internevo_line
from internlm.monitor.metrics_collector import MetricsCollector
from internlm.utils.logging import ROOT_LOGGER, get_logger

logger = get_logger(__name__)


def describe(numbers: Mapping[str, float | str]) -> str:
    """The most important numbers in one line: loss, learning rate, gradient norm, throughput.

    Args:
        numbers: result of `MetricsCollector.numbers`.
    """
    parts = ["no label"] if numbers.get("valid_tokens") == 0 else []
    for name, text in (("loss", "{:.4f}"), ("lr", "{:.3e}"), ("grad_norm", "{:.3f}"), ("acc", "{:.4f}")):
        if name in numbers:
            parts.append(f"{name} {text.format(numbers[name])}")
    if numbers.get("loss_scale", 1) != 1:
        parts.append(f"loss_scale {numbers['loss_scale']:g}")
    if "tgs" in numbers:
        parts.append(f"tgs {numbers['tgs']:.0f} (mean {numbers['tgs/tgs_SMA']:.0f})")
    if "tflops" in numbers:
        parts.append(f"tflops {numbers['tflops']:.3g}")
    if "mfu" in numbers:
        parts.append(f"mfu {100 * float(numbers['mfu']):.1f}%")
    return "  ".join(parts)


def describe_duration(seconds: float) -> str:
    """A number of seconds as `1:02:03`; `-` unless it is finite."""
    return str(datetime.timedelta(seconds=round(seconds))) if math.isfinite(seconds) else "-"


class ConsoleHook(Hook):
    """Shows the progress of the run on the main rank.

    Skipped updates are reported with the next numbers shown, because counting them earlier would wait for the device.

    Args:
        collector: shared with the other sinks.
        log_every: steps between two lines, or two refreshes of the numbers beside the bar. The first and the last step
            are always shown.
        log_format: "internevo" writes the lines of InternEvo: none for a skipped update, and never a bar.
        console: where the bar is shown, if it is a terminal; None for stderr.
    """

    name = "console"

    def __init__(
        self,
        collector: MetricsCollector,
        log_every: int = 1,
        log_format: Literal["default", "internevo"] = "default",
        console: Console | None = None,
    ) -> None:
        self.collector = collector
        self.log_format = log_format
        self.log_every = max(1, log_every)
        self._console = console
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._redirected: list[tuple[logging.StreamHandler[TextIO], TextIO]] = []
        self._first_step = 0
        self._known_skips: float | None = None

    def on_fit_start(self, trainer: RunningTrainer) -> None:
        if not trainer.is_main_rank:
            return
        self._first_step = trainer.state.step + 1
        self._known_skips = None
        console = self._console or Console(stderr=True)
        if not console.is_terminal or self.log_format == "internevo":
            return
        self._progress = Progress(
            BarColumn(bar_width=16),
            # One text column, so that a narrow terminal truncates its end, the least important numbers.
            TextColumn("step {task.completed}/{task.total}  eta {task.fields[eta]}  {task.fields[numbers]}"),
            console=console,
        )
        self._task = self._progress.add_task(
            "training", total=trainer.total_steps, completed=trainer.state.step, numbers="", eta="-"
        )
        stderr = sys.stderr
        self._progress.start()
        self._redirect_log(stderr)

    def on_step_end(self, trainer: RunningTrainer, metrics: StepMetrics) -> None:
        if not trainer.is_main_rank:
            return
        self.collector.count(metrics)
        step = trainer.state.step
        shown = step % self.log_every == 0 or step in (self._first_step, trainer.total_steps)
        eta = describe_duration((trainer.total_steps - step) * self.collector.throughput.seconds_per_step())
        if self._progress is not None:
            self._progress.update(self._task, completed=step, eta=eta)
        if not shown:
            return
        numbers = self.collector.numbers(metrics)
        self._report_skips(step, numbers)
        if self._progress is not None:
            self._progress.update(self._task, numbers=escape(describe(numbers)))
        elif self.log_format == "internevo":
            if not numbers["skipped"]:
                logger.info("%s", internevo_line(numbers))
        else:
            logger.info("step %d/%d  %s  eta %s", step, trainer.total_steps, describe(numbers), eta)

    def on_evaluation_end(self, trainer: RunningTrainer, results: dict[str, float]) -> None:
        if trainer.is_main_rank:
            shown = {name: value for name, value in results.items() if "_by_position/" not in name}
            logger.info(
                "step %d  %s", trainer.state.step, "  ".join(f"{name} {value:.4f}" for name, value in shown.items())
            )
            infinite = [name for name, value in results.items() if not math.isfinite(value)]
            if infinite:
                logger.warning("step %d: %s: not finite", trainer.state.step, ", ".join(infinite))

    def on_exception(self, trainer: RunningTrainer, error: BaseException) -> None:
        self._stop()

    def on_fit_end(self, trainer: RunningTrainer) -> None:
        self._stop()

    def _report_skips(self, step: int, numbers: Mapping[str, float | str]) -> None:
        skips = float(numbers["inf_nan_skip_batches"])
        # A resumed run continues the count; earlier processes reported what they skipped.
        known = skips - float(numbers["skipped"]) if self._known_skips is None else self._known_skips
        if skips > known:
            logger.warning(
                "step %d: %d update(s) skipped for an inf or NaN gradient since the last report, %d since the start "
                "of the run; loss scale is now %g",
                step,
                skips - known,
                skips,
                numbers["loss_scale"],
            )
        self._known_skips = skips

    def _redirect_log(self, stderr: TextIO) -> None:
        # The log's handler holds the original stderr; through rich's stream, its lines appear above the bar.
        for handler in logging.getLogger(ROOT_LOGGER).handlers:
            if type(handler) is logging.StreamHandler and handler.stream is stderr:
                handler.setStream(sys.stderr)
                self._redirected.append((handler, stderr))

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        for handler, stderr in self._redirected:
            handler.setStream(stderr)
        self._redirected = []
