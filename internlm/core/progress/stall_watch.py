"""Reports slow steps, and ends a job in which a rank is stuck before the timeout of its collectives.

A background thread watches this rank's `Progress`. The lowest rank that is not silent speaks for the job: it reads the
reports of the other ranks and names the one that they wait for. Every rank writes its own stacks.
"""

from __future__ import annotations

import faulthandler
import statistics
import threading
import time
from collections import deque
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist

from internlm.core.failure import FailureWatch
from internlm.core.progress.record import Progress
from internlm.core.progress.reports import (
    Report,
    ReportExchange,
    end_of_process,
    ranks_behind,
    state_of_process,
    this_machine,
)
from internlm.utils.logging import get_logger

logger = get_logger(__name__)

ACTIVITY_FACTOR = 10
"""Factor on `slow_seconds` for announced activities, such as saving."""

USUAL_FACTOR = 2
"""A step is slow only when it takes this many times the median of the last ones."""

MIN_USUAL = 3
"""Steps needed for a median; the first one compiles and chooses kernels."""

BACKSTOP_SECONDS = 30.0
"""Time beyond `stuck_seconds` after which a collective should time out, so that the cause is reported first."""

MAX_NAMED = 8
"""Number of ranks that one message names."""


class StallWatch:
    """Reports slow steps, and ends a stuck job. In a run of one process it only reports.

    A context manager; call `start` when the folder of the run is known.

    Args:
        rank: this rank.
        world_size: number of ranks; if more than one, the default process group must exist.
        progress: of this rank.
        failure: ends a stuck job.
        slow_seconds: a step that takes longer is reported, unless it is less than twice the median.
        stuck_seconds: a rank that waits longer than this for another one within a phase ends the job.
        store_holder: the rank that holds the job's store; None when the launcher does.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        progress: Progress,
        failure: FailureWatch,
        *,
        slow_seconds: float,
        stuck_seconds: float,
        store_holder: int | None = 0,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.progress = progress
        self.slow_seconds = slow_seconds
        self.stuck_seconds = stuck_seconds
        self.store_holder = store_holder
        self._failure = failure
        self._poll = min(1.0, slow_seconds / 5, stuck_seconds / 5)
        self._exchange: ReportExchange | None = None
        if world_size > 1:
            store: Any = dist.distributed_c10d._get_default_store()
            interval = min(5.0, slow_seconds / 12, stuck_seconds / 12)
            self._exchange = ReportExchange(store.clone(), rank, progress, interval)
        self._usual: deque[float] = deque(maxlen=20)
        self._began = progress.began
        self._num_warnings = 0
        self._stacks: IO[str] | None = None
        self._stacks_of: float | None = None
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> StallWatch:
        return self

    def start(self, stacks_file: Path) -> None:
        """Start the thread.

        Args:
            stacks_file: receives the stacks of this rank when it is stuck; removed at the end when empty.
        """
        # Opened now: a blocked interpreter cannot open files.
        self._stacks = stacks_file.open("a", encoding="utf-8")
        self._failure.before_exit = self.write_stacks
        if self._exchange is not None:
            self._exchange.start()
        self._schedule_dump()  # before the first poll: a thread may take the GIL until then
        self._thread = threading.Thread(target=self._watch, name="stall-watch", daemon=True)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        if self._thread is None:
            return
        self._stopped.set()
        self._thread.join()
        if self.progress.began != self._began:
            self._end_of_a_step(self.progress.began)
        faulthandler.cancel_dump_traceback_later()
        if self._exchange is not None:
            self._exchange.stop()
        assert self._stacks is not None
        self._failure.before_exit = lambda: None
        is_empty = self._stacks.tell() == 0 and Path(self._stacks.name).stat().st_size == 0
        self._stacks.close()
        if is_empty:
            Path(self._stacks.name).unlink()

    def write_stacks(self) -> None:
        """Write the Python stacks of all threads of this process, once per phase."""
        if self._stacks is None or self._stacks_of == self.progress.changed:
            return
        self._stacks_of = self.progress.changed
        seconds = time.monotonic() - self.progress.changed
        clock = time.strftime("%Y-%m-%d %H:%M:%S")
        self._stacks.write(f"{clock} rank {self.rank}, for {seconds:.0f} s in {self.progress}\n")
        self._stacks.flush()
        faulthandler.dump_traceback(self._stacks, all_threads=True)

    # -- the thread -----------------------------------------------------------------------------------------------

    def _schedule_dump(self) -> None:
        """Have the stacks written unless the watch calls this again in time.

        A thread that holds the GIL blocks the watch, too; the timer of faulthandler does not need the GIL.
        """
        assert self._stacks is not None
        faulthandler.dump_traceback_later(max(self.slow_seconds, 2 * self._poll), file=self._stacks)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._stopped.wait(self._poll):
            self._schedule_dump()
            now = time.monotonic()
            if now - last > 3 * self._poll + 1 and self._exchange is not None:
                self._exchange.restart()
            last = now
            self._check()

    def _check(self) -> None:
        progress, now = self.progress, time.monotonic()
        if progress.began != self._began:
            self._end_of_a_step(progress.began)
        seconds, limit = now - self._began, self._limit()
        if self._exchange is not None:
            is_near = seconds > limit / 2 or now - progress.changed > self.stuck_seconds / 2
            self._exchange.wanted = self._to_read() if is_near else ()
            if not is_near:
                self._exchange.received.clear()
        if seconds >= limit * 2**self._num_warnings:
            self._num_warnings += 1
            if self._is_speaker():
                logger.warning("%s has taken %.0f s; %s", self._what(), seconds, self._explain()[1])
        if now - progress.changed >= self.stuck_seconds:
            self._stuck(now - progress.changed)

    def _end_of_a_step(self, began: float) -> None:
        seconds = began - self._began
        if self._num_warnings and self._is_speaker():
            logger.warning("it ended after %.0f s", seconds)
        self._usual.append(seconds)
        self._began, self._num_warnings = began, 0

    def _limit(self) -> float:
        if self.progress.activity:
            return ACTIVITY_FACTOR * self.slow_seconds
        usual = statistics.median(self._usual) if len(self._usual) >= MIN_USUAL else 0.0
        return max(self.slow_seconds, USUAL_FACTOR * usual)

    def _what(self) -> str:
        progress = self.progress
        return str(progress) if progress.activity or not progress.step else f"step {progress.step}"

    def _stuck(self, seconds: float) -> None:
        self.write_stacks()
        if self._exchange is None or not self._is_speaker():
            return
        ranks, text = self._explain()
        # If no rank is behind, all may be working, and the timeout of the collectives decides.
        if ranks:
            assert self._stacks is not None
            self._failure.declare(
                f"rank {self.rank} made no progress for {seconds:.0f} s in {self.progress} "
                f"(monitor.collective_timeout_seconds): {text}; stacks: {Path(self._stacks.name).parent}/rank*.stacks"
            )

    # -- the other ranks ------------------------------------------------------------------------------------------

    def _is_speaker(self) -> bool:
        """Whether this rank reports for the job: all lower ranks are silent."""
        exchange = self._exchange
        if exchange is None or self.rank == 0:
            return True
        return exchange.store_is_silent or all(exchange.is_silent(rank) for rank in range(self.rank))

    def _to_read(self) -> tuple[int, ...]:
        """The ranks whose reports to read: up to this one while a lower rank is not silent, else all."""
        assert self._exchange is not None
        for rank in range(self.rank):
            if not self._exchange.is_silent(rank):
                return tuple(range(rank + 1))
        return tuple(range(self.world_size))

    def _explain(self) -> tuple[list[int], str]:
        """The ranks that the job waits for, and a description of what they are doing."""
        exchange = self._exchange
        if exchange is None:
            return [], self._describe_phase(str(self.progress), time.monotonic() - self.progress.changed)
        if exchange.store_is_silent:
            holder = [] if self.store_holder in (None, self.rank) else [self.store_holder]
            whose = f"rank {self.store_holder}" if holder else "the launcher"
            return holder or [self.rank], f"waiting for {whose}, which holds the job's store and does not respond"
        received = dict(exchange.received)
        reports = {rank: entry.report for rank, entry in received.items() if entry.report is not None}
        reports[self.rank] = exchange.own()
        silent = [rank for rank in sorted(received) if rank != self.rank and exchange.is_silent(rank)]
        if silent:
            texts = [self._describe_silent(rank, reports.get(rank)) for rank in silent[:MAX_NAMED]]
            return silent, self._waiting_for(silent, texts)
        behind = ranks_behind({rank: report.collectives for rank, report in reports.items()})
        shown = behind or sorted(reports)
        texts = [self._describe(rank, reports[rank]) for rank in shown[:MAX_NAMED]]
        if behind:
            return behind, self._waiting_for(behind, texts)
        return [], "; ".join(["no rank is behind the others", *texts]) + (" ..." if len(shown) > MAX_NAMED else "")

    @staticmethod
    def _describe_phase(phase: str, seconds: float) -> str:
        return f"in {phase} for {seconds:.0f} s"

    def _describe(self, rank: int, report: Report) -> str:
        # A rank that was stopped or killed just now is not silent yet.
        trouble = end_of_process(report, this_machine())
        if trouble is None:
            return f"rank {rank}, {self._describe_phase(report.phase, report.seconds)}"
        return f"rank {rank}, last seen in {report.phase}: {trouble}"

    @staticmethod
    def _describe_silent(rank: int, report: Report | None) -> str:
        if report is None:
            return f"rank {rank}, which has sent no report"
        return f"rank {rank}, last seen in {report.phase}: {state_of_process(report, this_machine())}"

    @staticmethod
    def _waiting_for(ranks: list[int], texts: list[str]) -> str:
        more = f" and {len(ranks) - MAX_NAMED} more" if len(ranks) > MAX_NAMED else ""
        return f"waiting for {'; '.join(texts)}{more}"
