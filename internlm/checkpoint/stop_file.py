"""The stop file: a number in it asks the run to save or to stop at a step."""

from __future__ import annotations

from pathlib import Path

from internlm.core.hooks import Hook, RunningTrainer
from internlm.utils.errors import ConfigError
from internlm.utils.logging import get_logger

logger = get_logger(__name__)


class StopFileHook(Hook):
    """Reads a number from a file at every step: N saves and stops at step N, -N saves at step N and continues.

    The file is overwritten with 0 when the loop starts. Only the main rank accesses it.
    """

    name = "stop_file"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._complaint = ""

    def on_fit_start(self, trainer: RunningTrainer) -> None:
        self._complaint = ""
        if not trainer.is_main_rank:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("0\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"ckpt.stop_file_path = '{self.path}' cannot be written: {error}; set another file, or None"
            ) from error

    def on_step_start(self, trainer: RunningTrainer) -> None:
        if trainer.is_main_rank:
            trainer.request_at(self._read())

    def _read(self) -> int:
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace").strip()
            # An editor truncates the file before it writes: an empty file is no request.
            return int(text) if text else 0
        except OSError as error:
            self._complain(f"cannot be read: {error}")
        except ValueError:
            self._complain(f"contains {text[:40]!r}, not a step")
        return 0

    def _complain(self, complaint: str) -> None:
        if complaint != self._complaint:
            logger.warning(
                "the stop file '%s' %s; it is ignored. Write N into it to save and stop at step N, -N to save only",
                self.path,
                complaint,
            )
        self._complaint = complaint
