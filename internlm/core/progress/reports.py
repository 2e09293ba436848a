"""Progress reports of the ranks, and the search for the rank that the others wait for.

Every rank writes a report to the job's store every few seconds. The reports are read only when a step takes long.
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
"""Number of missed reports after which a rank is silent."""


@dataclass(frozen=True)
class Report:
    """The report of one rank about itself.

    Attributes:
        number: sequence number of the report.
        phase: activity, phase and step.
        seconds: time since the phase began.
        collectives: see `Progress.num_collectives`.
        machine: equal for two ranks that see each other's process ids.
        pid: process id.
    """

    number: int
    phase: str
    seconds: float
    collectives: Mapping[str, int] = field(default_factory=dict)
    machine: str = ""
    pid: int = 0


@dataclass
class ReceivedReport:
    """The newest report of a rank, as received by another rank.

    Attributes:
        report: None if the rank has written none yet.
        since: `time.monotonic()` of the reader when it first saw that report.
    """

    report: Report | None
    since: float


class ReportExchange:
    """Writes this rank's reports and, on request, reads those of others, in a thread of its own.

    The store is held by one rank or by the launcher. If that process is stopped, a request to the store never returns,
    so no other thread may wait for this one.

    Args:
        store: a connection used only here.
        rank: this rank.
        progress: of this rank.
        interval: seconds between two reports.

    Attributes:
        wanted: ranks whose reports are to be read; set from another thread.
        received: their newest reports, by rank.
        answered: `time.monotonic()` of the last response of the store.
    """

    def __init__(self, store: Any, rank: int, progress: Progress, interval: float) -> None:
        self.wanted: tuple[int, ...] = ()
        self.received: dict[int, ReceivedReport] = {}
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
        """Stop the thread; does not wait for a store that may be gone."""
        self._stopped.set()
        self._thread.join(1.0)

    def restart(self) -> None:
        """Discard all reports and times, after this process itself was suspended."""
        self.received.clear()
        self.answered = time.monotonic()

    def own(self) -> Report:
        """This rank's current report."""
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
        """Whether no new report of a rank was found for a while, although its reports were read."""
        received = self.received.get(rank)
        return received is not None and time.monotonic() - received.since > MISSED_REPORTS * self._interval

    @property
    def store_is_silent(self) -> bool:
        """Whether the store has not responded for a while."""
        return time.monotonic() - self.answered > (MISSED_REPORTS + 1) * self._interval

    def _run(self) -> None:
        # Raises when the rank that holds the store ends, which the failure watch reports.
        with contextlib.suppress(Exception):
            while not self._stopped.is_set():
                self._number += 1
                self._store.set(f"{KEY}/{self._rank}", json.dumps(asdict(self.own())))
                # A read, to see whether the store still responds.
                self._read(self._rank)
                for rank in self.wanted:
                    self._read(rank)
                self._stopped.wait(self._interval)

    def _read(self, rank: int) -> None:
        key = f"{KEY}/{rank}"
        # `get` would block until the rank has written its first report.
        report = Report(**json.loads(self._store.get(key))) if self._store.check([key]) else None
        self.answered = time.monotonic()
        last = self.received.get(rank)
        if last is None or (report is not None and report != last.report):
            self.received[rank] = ReceivedReport(report, self.answered)


def this_machine() -> str:
    """Identifies the machine or container, and its namespace of process ids."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def ranks_behind(collectives: Mapping[int, Mapping[str, int]]) -> list[int]:
    """The ranks that the others wait for: behind another rank in some group, and ahead of none in any.

    Args:
        collectives: for each rank, the number of collectives that it has started in each of its groups.

    Returns:
        Their numbers, sorted; empty where the counts are inconclusive.
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
    """Why the process of a rank on this machine can no longer run; None if it can, or is on another machine."""
    if report.machine != machine:
        return None
    try:
        # The command name, in parentheses, may contain anything.
        state = Path(f"/proc/{report.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return f"its process {report.pid} is gone"
    if state in "Tt":
        return f"its process {report.pid} is stopped, by a signal or a debugger"
    if state in "ZX":
        return f"its process {report.pid} is dead"
    return None


def state_of_process(report: Report, machine: str) -> str:
    """The probable reason why a rank is silent."""
    if report.machine != machine:
        return "its process is stopped, or its machine unreachable"
    blocked = f"its process {report.pid} is alive, but all its Python threads are blocked"
    return end_of_process(report, machine) or blocked
