"""A trace of one step for `--profiling`: chooses the step that torch.profiler records, and writes the trace."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from internlm.core.hooks import Hook, RunningTrainer
from internlm.core.step_metrics import StepMetrics
from internlm.utils.logging import get_logger

FOLDER = "traces"
STEPS_NEEDED = 3

logger = get_logger(__name__)


class ProfilerHook(Hook):
    """Records the third step of the loop on the main rank, after one step without profiler and one to warm it up.

    Writes a Chrome trace, `traces/step_<n>.json` in the run directory; https://ui.perfetto.dev opens it.
    """

    name = "profiler"

    def __init__(self) -> None:
        self._profiler: profile | None = None
        self._trace: Path | None = None

    def on_fit_start(self, trainer: RunningTrainer) -> None:
        if not trainer.is_main_rank:
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._trace = trainer.run_dir / FOLDER / f"step_{trainer.state.step + STEPS_NEEDED}.json"
        self._profiler = profile(
            activities=activities,
            schedule=schedule(wait=1, warmup=1, active=1, repeat=1),
            on_trace_ready=self._export,
            record_shapes=True,
            # There is only one cycle; some versions of PyTorch warn that earlier ones would be dropped.
            acc_events=True,
        )
        self._profiler.start()

    def on_step_end(self, trainer: RunningTrainer, metrics: StepMetrics) -> None:
        if self._profiler is not None:
            self._profiler.step()
            if self._trace is None:
                self._stop()

    def on_exception(self, trainer: RunningTrainer, error: BaseException) -> None:
        self._stop()

    def on_fit_end(self, trainer: RunningTrainer) -> None:
        if self._trace is not None:
            logger.warning("--profiling: no trace was written: the run needs at least %d steps", STEPS_NEEDED)
        self._stop()

    def _export(self, profiler: profile) -> None:
        if self._trace is None:
            return  # the loop ended within the recorded step
        self._trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self._trace))
        logger.info("wrote the profile of one step to %s", self._trace)
        self._trace = None

    def _stop(self) -> None:
        if self._profiler is not None:
            profiler, self._profiler = self._profiler, None
            self._trace = None
            profiler.stop()
