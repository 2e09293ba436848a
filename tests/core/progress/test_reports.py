"""The rank that the others wait for, and what is known of a silent rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch.distributed as dist

from internlm.core.progress.record import Progress
from internlm.core.progress.reports import (
    Report,
    ReportExchange,
    end_of_process,
    ranks_behind,
    state_of_process,
    this_machine,
)


@pytest.mark.parametrize(
    ("collectives", "behind"),
    [
        ({0: {"world": 7}, 1: {"world": 6}, 2: {"world": 7}}, [1]),
        ({0: {"world": 7}, 1: {"world": 7}}, []),
        # Rank 1 waits for rank 2, and rank 0 waits for rank 1.
        ({0: {"a": 3}, 1: {"a": 2, "b": 5}, 2: {"b": 4}}, [2]),
        # Two independent pairs.
        ({0: {"a": 3}, 1: {"a": 2}, 2: {"b": 3}, 3: {"b": 4}}, [1, 2]),
        # Each has begun one that the other has not: the counts do not tell.
        ({0: {"a": 3, "b": 1}, 1: {"a": 2, "b": 2}}, []),
        ({0: {}}, []),
    ],
)
def test_the_rank_behind_is_the_one_that_waits_for_nobody(
    collectives: dict[int, dict[str, int]], behind: list[int]
) -> None:
    assert ranks_behind(collectives) == behind


def test_the_state_of_a_process_of_this_machine() -> None:
    machine = this_machine()
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    report = Report(1, "forward, step 3", 2.0, {}, machine, process.pid)
    try:
        assert state_of_process(report, machine).endswith("is alive, but all its Python threads are blocked")
        assert end_of_process(report, machine) is None
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        assert "is stopped, by a signal" in state_of_process(report, machine)
        assert end_of_process(report, machine) == state_of_process(report, machine)
    finally:
        process.kill()
        process.wait()
    assert state_of_process(report, machine) == f"its process {process.pid} is gone"
    elsewhere = replace(report, machine="another")
    assert state_of_process(elsewhere, machine) == "its process is stopped, or its machine unreachable"
    assert end_of_process(elsewhere, machine) is None


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_rank_that_sends_nothing_is_silent_once_it_was_looked_for() -> None:
    store = dist.HashStore()
    there, reader = (ReportExchange(store, rank, Progress(), 0.2) for rank in (1, 0))
    reader.wanted = (1, 2)
    there.start()
    reader.start()
    wait_until(lambda: reader.is_silent(2))
    assert not reader.is_silent(1)
    assert not reader.is_silent(3)  # nobody looked
    report = reader.received[1].report
    assert report is not None and report.phase == "start" and report.pid == os.getpid()
    there.stop()
    wait_until(lambda: reader.is_silent(1))
    reader.stop()
