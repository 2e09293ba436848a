"""Processes forked for one test, with an exit code to look at: for what the ranks of `helpers.ranks` cannot survive."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


class Forked:
    """`function()` in a process of its own; what it returns is the exit code (None is 0).

    Args:
        function: need not be picklable.
        output: the file for stdout and stderr together.
        own_group: give the process a group of its own, as a shell does, so that a signal can go to all of it.
    """

    def __init__(self, function: Callable[[], int | None], output: Path, own_group: bool = False) -> None:
        self.output_file = output
        output.parent.mkdir(parents=True, exist_ok=True)
        fork = multiprocessing.get_context("fork")
        self.process: Any = fork.Process(target=_run, args=(function, output, own_group))
        self.process.start()

    @property
    def pid(self) -> int:
        """The id of the process."""
        return self.process.pid

    @property
    def output(self) -> str:
        """All that it printed so far."""
        return self.output_file.read_text(encoding="utf-8") if self.output_file.exists() else ""

    def wait(self, timeout: float = 60.0) -> int:
        """Its exit code, -9 when killed by signal 9; one that takes longer than `timeout` seconds is a failure."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.kill()
            raise AssertionError(f"the process did not end within {timeout} s; its output:\n{self.output}")
        return self.process.exitcode

    def wait_until(self, condition: Callable[[], bool], timeout: float = 60.0) -> None:
        """Wait for something that this process does."""
        deadline = time.monotonic() + timeout
        while not condition():
            if self.process.exitcode is not None or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"what the test waits for did not happen; the output:\n{self.output}")
            time.sleep(0.01)

    def send(self, number: signal.Signals, group: bool = False) -> None:
        """Send a signal to the process, or to its whole group."""
        (os.killpg if group else os.kill)(self.pid, number)

    def kill(self) -> None:
        """End it at once, if it still runs."""
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()


def _run(function: Callable[[], int | None], output: Path, own_group: bool) -> None:
    if own_group:
        os.setpgid(0, 0)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 (it serves until the process ends)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    # The accelerator of the parent cannot be used after a fork.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.exit(function())


def wait_for_all(processes: Sequence[Forked], timeout: float = 60.0) -> list[int]:
    """The exit codes of all; all are killed when one takes too long."""
    try:
        return [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()


def free_port() -> int:
    """A TCP port that nobody listens on, and that the kernel gives to no outgoing connection.

    The kernel takes the ports of outgoing connections from its ephemeral range, where a free port may be taken before
    the test listens on it.
    """
    ephemeral = Path("/proc/sys/net/ipv4/ip_local_port_range")
    first, last = map(int, ephemeral.read_text().split()) if ephemeral.exists() else (49152, 65535)
    ports = [port for port in range(10000, 65536) if not first <= port <= last]
    start = random.SystemRandom().randrange(len(ports))
    for port in ports[start:] + ports[:start]:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise AssertionError(f"no TCP port outside of {first} to {last}, the range in {ephemeral}, is free")
