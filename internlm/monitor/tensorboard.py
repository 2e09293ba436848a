"""All numbers of a run as TensorBoard scalars. Owns the event folder; the tensorboard package is optional."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internlm.core.hooks import Hook, RunningTrainer
from internlm.core.step_metrics import StepMetrics
from internlm.monitor.deferred_metrics import SECONDS_AFTER_AN_EXCEPTION, DeferredMetrics
from internlm.monitor.metrics_collector import MetricsCollector
from internlm.utils.logging import get_logger
from internlm.utils.storage import full_disk

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

DEFAULT_FOLDER = "tensorboards"

logger = get_logger(__name__)


class TensorBoardHook(Hook):
    """Writes every number of every step on the main rank, at most one step later.

    If the folder has points of steps after the one at which the run starts, they are purged.

    Args:
        collector: shared with the other sinks.
        folder: the event folder. None selects that of the resumed run, or `tensorboards` in the run directory.
        resume_folder: event folder of an earlier run to continue; takes precedence over `folder`.
        queue_max_length: events buffered before they are written; 1 writes each at once.
    """

    name = "tensorboard"

    def __init__(
        self,
        collector: MetricsCollector,
        folder: Path | None = None,
        resume_folder: Path | None = None,
        queue_max_length: int = 1,
    ) -> None:
        self._deferred = DeferredMetrics(collector)
        self.folder = resume_folder or folder
        self.queue_max_length = queue_max_length
        self._writer: SummaryWriter | None = None
        self._texts: dict[str, str] = {}
        self._known_folder: str | None = None

    def on_fit_start(self, trainer: RunningTrainer) -> None:
        if not trainer.is_main_rank:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            logger.warning("TensorBoard is off: %s (pip install tensorboard, or set enable_tb = False)", error)
            return
        folder = self._choose_folder(trainer)
        written_before = folder.is_dir() and any(folder.glob("*tfevents*"))
        self._texts = {}
        self._writer = SummaryWriter(
            str(folder),
            purge_step=trainer.state.step + 1 if written_before else None,
            max_queue=self.queue_max_length,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"folder": self._known_folder}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._known_folder = state.get("folder")

    def _choose_folder(self, trainer: RunningTrainer) -> Path:
        """The event folder, which `state_dict` returns from here on."""
        own = self.folder or trainer.run_dir / DEFAULT_FOLDER
        before = Path(self._known_folder) if self._known_folder else None
        # Only for a resumed run: one that branches off a checkpoint would write into the curves of another run.
        is_resumed = trainer.resumed_from is not None and self.folder is None
        if is_resumed and before is not None and before != own.resolve():
            if before.is_dir() and os.access(before, os.W_OK):
                logger.info(
                    "TensorBoard: continuing in %s, like the resumed run (tensorboard_folder changes this)", before
                )
                own = before
            else:
                logger.warning("TensorBoard: cannot write to %s of the resumed run; starting in %s", before, own)
        self._known_folder = str(own.resolve())
        return own

    def on_step_end(self, trainer: RunningTrainer, metrics: StepMetrics) -> None:
        if self._writer is None:
            return
        self._write_deferred()
        self._deferred.defer(metrics)
        if self._deferred.has_arrived:
            self._write_deferred()

    def on_save_start(self, trainer: RunningTrainer) -> None:
        # A killed run may resume after this step and would not write its numbers again.
        self._write_deferred()

    def on_evaluation_end(self, trainer: RunningTrainer, results: dict[str, float]) -> None:
        if self._writer is not None:
            self._write(results, trainer.state.step)

    def on_exception(self, trainer: RunningTrainer, error: BaseException) -> None:
        self._deferred.discard_unless_arrived(SECONDS_AFTER_AN_EXCEPTION)
        self._close()

    def on_fit_end(self, trainer: RunningTrainer) -> None:
        self._close()

    def _write_deferred(self) -> None:
        numbers = self._deferred.pop_numbers()
        if numbers is not None:
            self._write(numbers, int(numbers["step"]))

    def _write(self, numbers: dict[str, float | str] | dict[str, float], step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        if self._writer is None:
            return
        scalars = []
        try:
            for name, value in numbers.items():
                if not isinstance(value, str):
                    scalars.append(Summary.Value(tag=name, simple_value=value))
                elif self._texts.get(name) != value:
                    self._writer.add_text(name, value, step)
                    self._texts[name] = value
            # One event per step: one event per number (`add_scalar`) would take milliseconds for dozens of numbers.
            file_writer: Any = self._writer.file_writer
            file_writer.add_summary(Summary(value=scalars), step)
        except OSError as error:
            # Raised by TensorBoard's writer thread, which has ended.
            self._give_up(error)

    def _close(self) -> None:
        if self._writer is not None:
            self._write_deferred()
        if self._writer is not None:
            try:
                self._writer.close()
            except OSError as error:
                self._give_up(error)
            self._writer = None

    def _give_up(self, error: OSError) -> None:
        assert self._writer is not None
        error.filename = error.filename or self._writer.get_logdir()
        logger.error("TensorBoard is off from now on, and the run continues: %s", full_disk(error) or error)
        self._writer = None
