"""The folder of a run, as a page shows it: curves of its numbers, its layout, and the timeline of a step."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from internlm.monitor.metrics_curves import MetricsCurves
from internlm.monitor.metrics_file import FILE_NAME, REPLACED_NAME
from internlm.monitor.run_file import FILE_NAME as RUN_FILE_NAME
from internlm.monitor.run_file import read_run_file
from internlm.utils.errors import ConfigError, UserError


class RunFolder:
    """Reads the folder of a run, which may be in progress. Its methods may be called from several threads.

    Args:
        path: the folder, or its metrics file.

    Attributes:
        path: the folder.

    Raises:
        ConfigError: it is no folder of a run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.parent if path.name == FILE_NAME else path
        try:
            names = sorted(entry.name for entry in self.path.iterdir())
        except OSError as error:
            raise ConfigError(f"'{self.path}' is no folder of a run: {error.strerror or error}") from None
        if not {FILE_NAME, RUN_FILE_NAME, "logs"} & {*names}:
            inside = [name for name in names if (self.path / name / FILE_NAME).is_file()]
            raise ConfigError(
                f"'{self.path}' is no folder of a run: it has no {FILE_NAME}, nor {RUN_FILE_NAME}"
                + (f"; the folders of runs in it: {', '.join(inside[:5])}" if inside else "")
            )
        if (self.path / FILE_NAME).exists() and not (self.path / FILE_NAME).is_file():
            raise ConfigError(f"'{self.path / FILE_NAME}' is no file")
        self._curves = MetricsCurves(self.path / FILE_NAME)
        self._reading = threading.Lock()

    @property
    def name(self) -> str:
        """Its last parts, as a title."""
        return "/".join(self.path.absolute().parts[-2:])

    def curves(self, names: Sequence[str], version: int | None = None, start: int = 0) -> dict[str, Any]:
        """What `MetricsCurves.view` says, after reading what was appended, with `is_complete`, `notices` and `age`.

        `age` is the time since the file was written, in seconds; None without a file.

        Raises:
            UserError: the file cannot be read.
        """
        with self._reading:
            try:
                is_complete = self._curves.update()
            except OSError as error:
                raise UserError(f"'{self.path / FILE_NAME}' cannot be read: {error.strerror or error}") from error
            view = self._curves.view(names, version, start)
            return {**view, "is_complete": is_complete, "notices": self._notices(), "age": self._age()}

    def _age(self) -> float | None:
        try:
            return max(0.0, time.time() - (self.path / FILE_NAME).stat().st_mtime)
        except OSError:
            return None

    def _notices(self) -> list[str]:
        curves = self._curves
        rules = {
            f"there is no {FILE_NAME}; the run writes it when its first step has ended": curves.is_missing,
            f"{FILE_NAME} was replaced or cut, and has been read again from its start; times: {curves.num_restarts}": (
                curves.num_restarts
            ),
            f"steps were trained again: {curves.num_superseded:,} lines are superseded by later ones, whose numbers "
            "are shown": curves.num_superseded,
            f"steps were trained again after a resume; {REPLACED_NAME} has their first numbers": (
                (self.path / REPLACED_NAME).is_file()
            ),
            f"{curves.num_unreadable:,} lines are no JSON object with a step, and are not shown": (
                curves.num_unreadable
            ),
            f"{curves.num_names_omitted:,} numbers are not shown, as there are too many names": (
                curves.num_names_omitted
            ),
        }
        return [text for text, holds in rules.items() if holds]

    def layout(self, rank: int) -> dict[str, Any]:
        """The groups of a rank, the stages of the model, and the timeline of a step.

        Raises:
            UserError: the run has no file that describes it, or the rank does not exist.
        """
        # It needs much that the curves do not need.
        from internlm.serve.run_layout import describe_layout

        run = read_run_file(self.path)
        if not 0 <= rank < run.world_size:
            raise UserError(f"rank = {rank}: must be from 0 to {run.world_size - 1}")
        return describe_layout(run, rank)
