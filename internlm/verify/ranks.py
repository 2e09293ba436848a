"""Runs cases on local ranks: CPU processes connected by gloo, which are all killed when one of them fails."""

from __future__ import annotations

import multiprocessing
import shutil
import tempfile
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from internlm.config.python_file import run_config_file
from internlm.core.failure import describe_error
from internlm.utils.errors import ConfigError, UserError
from internlm.verify.case import Case
from internlm.verify.record import RankRecord, Record, join_ranks
from internlm.verify.run import run_case

TIMEOUT_SECONDS = 600.0
"""Seconds after which a case is considered to hang; those of `internlm verify` take a few."""

GRACE_SECONDS = 2.0
"""Seconds to collect the failures of other ranks after the first one; the earliest is reported as the cause."""


class RankFailedError(Exception):
    """A rank raised or died; the message has its traceback, with the cause in the last line."""


@dataclass(frozen=True)
class _Failure:
    when: float
    cause: str
    details: str
    is_user_error: bool = False


class LocalRanks:
    """N processes on this machine that run cases; a context manager.

    Args:
        world_size: number of ranks; a single one has no process group.
        config_file: executed by each rank before its first case, as it may register a model type; None for none.
    """

    def __init__(self, world_size: int, config_file: Path | None = None) -> None:
        self.world_size = world_size
        self._config_file = config_file
        self._processes: list[BaseProcess] = []
        self._connections: list[Connection] = []
        self._rendezvous: Path | None = None

    def __enter__(self) -> LocalRanks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, case: Case, steps: int) -> Record:
        """Run a case on all ranks.

        Raises:
            RankFailedError: a rank failed. All ranks are killed; the next call starts new ones.
            ConfigError: the first failure is a user error.
            InconsistentRanksError: the ranks disagree.
        """
        if not self._processes:
            self._start()
        for connection in self._connections:
            connection.send((case, steps))
        records, failures = self._collect()
        if failures:
            self.close()
            first = min(failures, key=lambda failure: failure.when)
            if first.is_user_error:
                raise ConfigError(first.cause)
            raise RankFailedError(f"{first.details}{first.cause}")
        return join_ranks([records[rank] for rank in range(self.world_size)])

    def close(self) -> None:
        """Kill all ranks."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for connection in self._connections:
            connection.close()
        if self._rendezvous is not None:
            shutil.rmtree(self._rendezvous)
        self._processes, self._connections, self._rendezvous = [], [], None

    def _start(self) -> None:
        # A server that has imported torch forks each rank, which needs no imports and inherits none of our threads.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["internlm.verify.ranks", "internlm.verify.warm_up"])
        self._rendezvous = Path(tempfile.mkdtemp(prefix="internlm-verify-"))
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            arguments = (rank, self.world_size, str(self._rendezvous / "store"), self._config_file, theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def _collect(self) -> tuple[dict[int, RankRecord], list[_Failure]]:
        """Wait for each rank's record; after a first failure, collect those of other ranks for `GRACE_SECONDS`."""
        records: dict[int, RankRecord] = {}
        failures: list[_Failure] = []
        pending: dict[Any, int] = {connection: rank for rank, connection in enumerate(self._connections)}
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while pending:
            ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                if not failures:
                    late = sorted(pending.values())
                    failures.append(_Failure(0.0, f"ranks {late} did not answer within {TIMEOUT_SECONDS:.0f} s", ""))
                break
            for connection in cast(list[Connection], ready):
                rank = pending.pop(connection)
                answer = self._receive(connection, rank)
                if isinstance(answer, RankRecord):
                    records[rank] = answer
                else:
                    failures.append(answer)
            if failures:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        return records, failures

    def _receive(self, connection: Connection, rank: int) -> RankRecord | _Failure:
        try:
            return connection.recv()
        except EOFError:
            process = self._processes[rank]
            process.join(GRACE_SECONDS)
            # It died before it could report anything, so the failures of other ranks are consequences.
            return _Failure(0.0, f"rank {rank} ended without an answer, with exit code {process.exitcode}", "")


def _serve(rank: int, world_size: int, rendezvous: str, config_file: Path | None, connection: Connection) -> None:
    torch.set_num_threads(1)
    try:
        if config_file is not None:
            run_config_file(config_file)
        if world_size > 1:
            dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
        while True:
            case, steps = connection.recv()
            connection.send(run_case(case, steps))
    except EOFError:
        return
    except Exception as error:
        cause = f"rank {rank} failed: {describe_error(error)}"
        connection.send(_Failure(time.monotonic(), cause, traceback.format_exc(), isinstance(error, UserError)))
