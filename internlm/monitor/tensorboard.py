"""The numbers of a run as TensorBoard scalars. Owns the event folder; tensorboard is optional."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internlm.core.hooks import Hook, RunningTrainer
from internlm.core.step_metrics import StepMetrics
from internlm.monitor.step_numbers import SECONDS_AFTER_AN_EXCEPTION, HeldStep, StepNumbers
from internlm.utils.logging import get_logger
from internlm.utils.storage import full_disk

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

DEFAULT_FOLDER = "tensorboards"

logger = get_logger(__name__)


class TensorBoardHook(Hook):
    """Writes every number of every step, as soon as the device has them and at the latest a step later; only the main
    rank writes.

    When a run starts at a later step than 0, points that an earlier process wrote after that step are purged.

    Args:
        numbers: shared with the other sinks.
        folder: where to write. None: where the run wrote that this one resumes, else `tensorboards` in the run
            directory.
        resume_folder: a folder of an earlier run to continue; it wins over `folder`.
        queue_max_length: steps kept in memory before they are written; 1 shows each at once.
    """

    name = "tensorboard"

    def __init__(
        self,
        numbers: StepNumbers,
        folder: Path | None = None,
        resume_folder: Path | None = None,
        queue_max_length: int = 1,
    ) -> None:
        self._held = HeldStep(numbers)
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
        """Where to write, remembered for the checkpoints of this run."""
        own = self.folder or trainer.run_dir / DEFAULT_FOLDER
        before = Path(self._known_folder) if self._known_folder else None
        # Only a run that resumes: one that branches off from a checkpoint would write into the curves of another.
        is_resumed = trainer.resumed_from is not None and self.folder is None
        if is_resumed and before is not None and before != own.resolve():
            if before.is_dir() and os.access(before, os.W_OK):
                logger.info("TensorBoard: going on in %s, as the run before (tensorboard_folder changes that)", before)
                own = before
            else:
                logger.warning("TensorBoard: %s of the run before cannot be written; beginning anew in %s", before, own)
        self._known_folder = str(own.resolve())
        return own

    def on_step_end(self, trainer: RunningTrainer, metrics: StepMetrics) -> None:
        if self._writer is None:
            return
        self._write_held()
        self._held.hold(metrics)
        if self._held.has_arrived:
            self._write_held()

    def on_save_start(self, trainer: RunningTrainer) -> None:
        # A run killed later may go on after this step, and would not write its numbers again.
        self._write_held()

    def on_evaluation_end(self, trainer: RunningTrainer, results: dict[str, float]) -> None:
        if self._writer is not None:
            self._write(results, trainer.state.step)

    def on_exception(self, trainer: RunningTrainer, error: BaseException) -> None:
        self._held.drop_unless_it_arrives(SECONDS_AFTER_AN_EXCEPTION)
        self._close()

    def on_fit_end(self, trainer: RunningTrainer) -> None:
        self._close()

    def _write_held(self) -> None:
        numbers = self._held.take()
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
            # One event a step: an event a number (`add_scalar`) takes milliseconds for the few dozen of them.
            file_writer: Any = self._writer.file_writer
            file_writer.add_summary(Summary(value=scalars), step)
        except OSError as error:
            # That of its thread, which does the writing and has ended.
            self._give_up(error)

    def _close(self) -> None:
        if self._writer is not None:
            self._write_held()
        if self._writer is not None:
            try:
                self._writer.close()
            except OSError as error:
                self._give_up(error)
            self._writer = None

    def _give_up(self, error: OSError) -> None:
        assert self._writer is not None
        error.filename = error.filename or self._writer.get_logdir()
        logger.error("TensorBoard is off from here on, and the run goes on: %s", full_disk(error) or error)
        self._writer = None
