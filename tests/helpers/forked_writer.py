"""Forks the process that writes checkpoints in the background, in place of starting Python and importing torch anew."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any

import internlm.checkpoint.background as background
from internlm.checkpoint import writer_process
from internlm.utils.logging import ROOT_LOGGER


def fork_writers() -> None:
    """From now on, in this process."""
    background.subprocess = _ForkedPython  # type: ignore[assignment]


class _ForkedPython:
    """Stands in for `subprocess` where a run starts the process that writes."""

    DEVNULL = subprocess.DEVNULL
    TimeoutExpired = subprocess.TimeoutExpired

    class Popen:
        """`python -m internlm.checkpoint.writer_process ...`, with none of this process's files but `pass_fds`."""

        def __init__(self, command: Sequence[str], *, pass_fds: Sequence[int], **_: Any) -> None:
            self._code: int | None = None
            self.pid = os.fork()
            if self.pid:
                return
            try:
                kept = [0, 1, 2, *sorted(pass_fds)]
                for one, following in zip(kept, [*kept[1:], 4096], strict=True):
                    os.closerange(one + 1, following)
                # Their files are closed.
                logging.getLogger(ROOT_LOGGER).handlers.clear()
                sys.argv = list(command[2:])
                writer_process.main()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)

        def poll(self) -> int | None:
            if self._code is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self._code = os.waitstatus_to_exitcode(status) if pid else None
            return self._code

        def wait(self, timeout: float | None = None) -> int:
            deadline = None if timeout is None else time.monotonic() + timeout
            while (code := self.poll()) is None:
                if timeout is not None and deadline is not None and time.monotonic() > deadline:
                    raise subprocess.TimeoutExpired("the forked writer", timeout)
                time.sleep(0.001)
            return code

        @property
        def returncode(self) -> int | None:
            return self._code
