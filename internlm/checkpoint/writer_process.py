"""The process that writes checkpoints in the background; started by `internlm.checkpoint.background`.

It ignores the signals that end a run, completes the save in progress, and ends after the run.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

from internlm.checkpoint.background import SaveOutcome, SharedMemory, WriteRequest
from internlm.checkpoint.saving import (
    Copies,
    announce_part,
    collect_parts,
    complete,
    describe_failure,
    discard,
    follow_up,
    write_part,
)
from internlm.utils.logging import configure_logging

NICENESS = 10
"""Gives training priority on a shared CPU core."""


def main() -> None:
    """Serve requests until the run closes the connection or ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICENESS)
    read_end, write_end, memory = map(int, sys.argv[1:])
    requests, answers = Connection(read_end, writable=False), Connection(write_end, readable=False)
    shared = SharedMemory(memory)
    run = os.getppid()
    while True:
        try:
            request: WriteRequest = requests.recv()
        except EOFError:
            return
        # Warnings of the storage appear where those of the run do.
        configure_logging(request.task.rank)
        outcome = carry_out(request, shared, lambda: os.getppid() != run)
        try:
            answers.send(outcome)
        except OSError:
            return


def carry_out(
    request: WriteRequest, shared: SharedMemory, run_has_ended: Callable[[], bool] = lambda: False
) -> SaveOutcome:
    """Write this rank's part; on the main rank, wait for all parts and complete the checkpoint."""
    task = request.task
    error = notice = None
    try:
        end = max((memory_range.offset + memory_range.num_bytes for memory_range in request.ranges), default=0)
        memory = shared.bytes(max(1, end))
        tensors = [memory_range.view(memory) for memory_range in request.ranges]
        part = write_part(task, request.plan, Copies(request.plan.plan, tensors, request.values))
        if task.rank != 0:
            announce_part(task, part)
            error = part.error
        else:
            assert request.plan.metadata is not None
            try:
                parts = collect_parts(task, part, run_has_ended=run_has_ended)
            except BaseException:
                discard(task)
                raise
            complete(task, request.plan.metadata, parts)
            if not run_has_ended():
                # After the end of the run another one may be reading an older checkpoint.
                notice = follow_up(task)
    except Exception as failure:
        error = describe_failure(failure)
    return SaveOutcome(task.step, error, notice, time.monotonic())


if __name__ == "__main__":
    main()
