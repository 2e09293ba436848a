"""Run a function on N gloo ranks. The ranks are forked once a session for each N, and wait for work."""

from __future__ import annotations

import gc
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_SECONDS = 120.0

_MAX_THREADS = 40
"""Threads of a rank above which a pool starts anew. Every process group has three, which wake up a hundred times a
second; they live as long as anything refers to the group, such as a cache of torch."""


class RankFailedError(AssertionError):
    """A function failed on some rank; the message has the rank's traceback."""


class RankPool:
    """N forked processes joined by gloo. A job that fails ends the pool; the next job starts a new one."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._connections: list[Connection] = []
        self._processes: list[Any] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(*args)` on every rank, inside one process group; returns each rank's (picklable) result.

        Args:
            function: defined at the top of a test module.
        """
        if any(_num_threads(process.pid) > _MAX_THREADS for process in self._processes):
            self.close()
        if not self._processes:
            self._start()
        for connection in self._connections:
            connection.send((function, args))
        results: dict[int, Any] = {}
        failure = None
        pending = {connection: rank for rank, connection in enumerate(self._connections)}
        while pending and failure is None:
            ready = wait(list(pending), timeout=TIMEOUT_SECONDS)
            if not ready:
                failure = f"ranks {sorted(pending.values())} gave no answer in {TIMEOUT_SECONDS} s"
            for connection in ready:
                rank = pending.pop(connection)  # type: ignore[arg-type]
                try:
                    ok, value = connection.recv()  # type: ignore[union-attr]
                except EOFError:
                    ok, value = False, "the process ended"
                if ok:
                    results[rank] = value
                else:
                    failure = f"rank {rank} of {self.world_size}:\n{value}"
        if failure is not None:
            self.close()
            raise RankFailedError(failure)
        return [results[rank] for rank in range(self.world_size)]

    def _start(self) -> None:
        # Forking is 30 times faster than spawning, and safe while the children keep to one thread.
        fork = multiprocessing.get_context("fork")
        meeting = Path(tempfile.mkdtemp(prefix="ranks-")) / "store"
        for rank in range(self.world_size):
            ours, theirs = fork.Pipe()
            process = fork.Process(target=_serve, args=(rank, self.world_size, str(meeting), theirs), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def close(self) -> None:
        """End all ranks."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._connections, self._processes = [], []


def _serve(rank: int, world_size: int, meeting: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, function(*args)))
        except BaseException:
            connection.send((False, traceback.format_exc()))
            continue
        _destroy_groups()


def _num_threads(pid: int) -> int:
    tasks = Path(f"/proc/{pid}/task")
    return len(list(tasks.iterdir())) if tasks.is_dir() else 0


def _destroy_groups() -> None:
    """Destroy the process groups that a job has left."""
    # The last messages of a group must have arrived everywhere. A rank may be in no group but that of all ranks.
    dist.barrier()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    del group
    # Models and engines refer to their groups in cycles.
    gc.collect()
