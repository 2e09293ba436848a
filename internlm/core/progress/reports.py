"""What the ranks of a job say of their progress, and whom the others wait for.

Every rank puts a report into the job's store every few seconds. Nobody reads them while all goes well.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from internlm.core.progress.record import Progress

KEY = "internlm/progress"
MISSED_REPORTS = 4
"""A rank that leaves out as many reports is silent."""


@dataclass(frozen=True)
class Report:
    """What one rank says of itself.

    Attributes:
        number: counts the reports of this rank.
        phase: what it is doing, with the step.
        seconds: since when.
        collectives: see `Progress.num_collectives`.
        machine: equal for two ranks that see each other's process ids.
        pid: its process.
    """

    number: int
    phase: str
    seconds: float
    collectives: Mapping[str, int] = field(default_factory=dict)
    machine: str = ""
    pid: int = 0


@dataclass
class Heard:
    """The newest report of a rank, as another rank got it.

    Attributes:
        report: None when there has been none.
        since: `time.monotonic()` of the reader when that report was new.
    """

    report: Report | None
    since: float


class ReportExchange:
    """Sends this rank's reports, and reads those of others when asked. Talks to the store in a thread of its own.

    The store belongs to one rank, or to the launcher. Where its process is stopped, a question to it never ends: nobody
    else may wait for this thread.

    Args:
        store: a connection of its own.
        rank: this one.
        progress: of this rank.
        interval: seconds between two reports.

    Attributes:
        wanted: the ranks whose reports are read; set it from another thread.
        heard: what was read of them.
        answered: `time.monotonic()` of the last answer of the store.
    """

    def __init__(self, store: Any, rank: int, progress: Progress, interval: float) -> None:
        self.wanted: tuple[int, ...] = ()
        self.heard: dict[int, Heard] = {}
        self.answered = time.monotonic()
        self._store = store
        self._rank = rank
        self._progress = progress
        self._interval = interval
        self._machine = this_machine()
        self._number = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="report-exchange", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End soon; does not wait for a store that may be gone."""
        self._stopped.set()
        self._thread.join(1.0)

    def restart(self) -> None:
        """Forget what was heard and not heard: this process was held up itself."""
        self.heard.clear()
        self.answered = time.monotonic()

    def own(self) -> Report:
        """This rank's report of now."""
        progress = self._progress
        return Report(
            self._number,
            str(progress),
            round(time.monotonic() - progress.changed, 1),
            dict(progress.num_collectives()),
            self._machine,
            os.getpid(),
        )

    def is_silent(self, rank: int) -> bool:
        """Whether a rank has sent nothing for a while, in which its reports were looked for."""
        heard = self.heard.get(rank)
        return heard is not None and time.monotonic() - heard.since > MISSED_REPORTS * self._interval

    @property
    def store_is_silent(self) -> bool:
        """Whether the store has not answered for a while."""
        return time.monotonic() - self.answered > (MISSED_REPORTS + 1) * self._interval

    def _run(self) -> None:
        # Its end is the end of the rank that held the store, which the failure watch tells.
        with contextlib.suppress(Exception):
            while not self._stopped.is_set():
                self._number += 1
                self._store.set(f"{KEY}/{self._rank}", json.dumps(asdict(self.own())))
                # A question, to know that the store still answers.
                self._read(self._rank)
                for rank in self.wanted:
                    self._read(rank)
                self._stopped.wait(self._interval)

    def _read(self, rank: int) -> None:
        key = f"{KEY}/{rank}"
        # `get` would wait for a rank that has sent none yet.
        report = Report(**json.loads(self._store.get(key))) if self._store.check([key]) else None
        self.answered = time.monotonic()
        last = self.heard.get(rank)
        if last is None or (report is not None and report != last.report):
            self.heard[rank] = Heard(report, self.answered)


def this_machine() -> str:
    """The machine, or the container, whose process ids this process sees."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def ranks_behind(collectives: Mapping[int, Mapping[str, int]]) -> list[int]:
    """The ranks that others wait for, by how many collectives each has begun in each of its groups.

    A rank that has begun one more than another waits for it, or went on without waiting. The one to name is behind in
    some group, and ahead of nobody. Empty where the counts do not tell.
    """
    most: dict[str, int] = {}
    least: dict[str, int] = {}
    for counts in collectives.values():
        for group, count in counts.items():
            most[group] = max(count, most.get(group, count))
            least[group] = min(count, least.get(group, count))

    def is_behind(counts: Mapping[str, int]) -> bool:
        return any(count < most[group] for group, count in counts.items())

    def is_ahead(counts: Mapping[str, int]) -> bool:
        return any(count > least[group] for group, count in counts.items())

    return sorted(rank for rank, counts in collectives.items() if is_behind(counts) and not is_ahead(counts))


def end_of_process(report: Report, machine: str) -> str | None:
    """Why a rank can do nothing any more, as far as it can be seen from here; None where its process may run."""
    if report.machine != machine:
        return None
    try:
        # The command's name, in parentheses, may hold anything.
        state = Path(f"/proc/{report.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return f"its process {report.pid} is gone"
    if state in "Tt":
        return f"its process {report.pid} is stopped, by a signal or a debugger"
    if state in "ZX":
        return f"its process {report.pid} is dead"
    return None


def state_of_process(report: Report, machine: str) -> str:
    """Why a rank may be silent."""
    if report.machine != machine:
        return "its process is stopped, or its machine out of reach"
    held_up = f"its process {report.pid} is alive, but all its Python threads are held up"
    return end_of_process(report, machine) or held_up
