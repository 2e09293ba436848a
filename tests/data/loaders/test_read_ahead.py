"""Prefetching: order, errors, and that no worker outlives its parent."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from internlm.data.loaders.read_ahead import ReadAheadThread, WorkerProcesses
from internlm.utils.errors import DataError


def counting():
    return range(20)


def double(number):
    return number * 2


def fail_at_five(number):
    if number == 5:
        raise DataError("the fifth document is wrong")
    return number


def crash_at_five(number):
    return number // (number - 5)


def killed_at_five(number):
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("num_workers", [1, 3, 30])
def test_order_and_end(num_workers):
    workers = WorkerProcesses(double, counting, num_workers)
    assert list(workers) == [2 * number for number in range(20)]
    workers.stop()


def test_items_of_a_group_are_made_by_one_worker():
    # Groups 0, 1, 2 and 3, and items without a group.
    workers = WorkerProcesses(
        lambda number: (number, os.getpid()), counting, 3, lambda number: None if number % 5 == 4 else number % 5
    )
    made = list(workers)
    workers.stop()
    assert [number for number, _ in made] == list(range(20))
    makers = [{process for number, process in made if number % 5 == group} for group in range(4)]
    assert all(len(group) == 1 for group in makers)
    assert len(set.union(*makers)) == 3


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (fail_at_five, DataError, "^the fifth document is wrong$"),
        (crash_at_five, RuntimeError, r"(?s)data worker 1 failed:.*crash_at_five.*ZeroDivisionError"),
        (killed_at_five, RuntimeError, r"data worker 1 \(pid \d+\) exited unexpectedly, exit code -9"),
    ],
)
def test_errors_are_raised_in_order(make, kind, message):
    workers = WorkerProcesses(make, counting, 2)
    for _ in range(5):
        next(workers)
    with pytest.raises(kind, match=message):
        next(workers)
    workers.stop()


def test_stop_while_a_thread_waits_for_a_slow_worker():
    def slow(number):
        time.sleep(1000)

    workers = WorkerProcesses(slow, counting, 1)
    thread = ReadAheadThread(workers, 1)
    workers.stop()
    thread.stop()
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        workers.__next__()


def test_workers_end_when_their_parent_is_killed():
    code = """
        import os, time
        from internlm.data.loaders.read_ahead import WorkerProcesses
        workers = WorkerProcesses(lambda number: b"x" * 200_000, lambda: range(10**9), 2)
        next(workers)
        print(*[process.pid for process in workers._processes], flush=True)
        time.sleep(1000)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)


def _runs(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE  # a zombie has ended; nobody may ever reap it
    except psutil.NoSuchProcess:
        return False
