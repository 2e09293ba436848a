"""Requests to save or stop a running job, agreed on by all ranks.

Any rank may receive a request: from a signal, the stop file or a hook. Each rank contributes its requests to one small
all-reduce that overlaps the next step, so all ranks see the same result at the end of the same step and none waits.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from internlm.core.communication.collectives import all_reduce_async
from internlm.core.communication.pending import Pending

REQUESTED_ELSEWHERE = "requested on another rank"


class RunControl:
    """The requests of this rank, and what all ranks agreed on.

    Args:
        group: all ranks; None for one process.

    Attributes:
        stop_reason: why training stops after the step just counted; None if it continues. Set on the same step on all
            ranks; only the text may differ.
        save_reason: why the step just counted is saved, apart from periodic saves; None without a request. Likewise
            set on the same step on all ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.clear()

    def clear(self) -> None:
        """Discard all requests; called when a loop starts."""
        self.stop_reason: str | None = None
        self.save_reason: str | None = None
        self._stop: str | None = None
        self._save: str | None = None
        self._sent_save: str | None = None
        self._at = 0
        self._done_at = 0
        # On the host: reading the result must not wait for the device.
        self._votes = Pending(torch.zeros(3, dtype=torch.int64))

    # Signal handlers may call these three, so they only assign.

    def request_stop(self, reason: str) -> None:
        """Stop as soon as all ranks have agreed."""
        self._stop = reason

    def request_save(self, reason: str) -> None:
        """Save a checkpoint as soon as all ranks have agreed."""
        self._save = reason

    def request_at(self, step: int) -> None:
        """Save and stop at `step`; a negative `step` saves at step `-step`, 0 withdraws the request. One rank only."""
        self._at = step

    def agree(self, step: int) -> None:
        """Set `stop_reason` and `save_reason` for the step just counted; all ranks call it at the end of every step.

        In one process, requests take effect at once; with several ranks, those made before the end of the previous step
        do.

        Args:
            step: the number of the step just counted.
        """
        if self._group is None:
            votes = self._take_requests()
        else:
            votes = self._votes.wait().tolist()
        num_stops, num_saves, at = votes
        self.stop_reason = (self._stop or REQUESTED_ELSEWHERE) if num_stops else None
        self.save_reason = (self._sent_save or REQUESTED_ELSEWHERE) if num_saves else None
        self._sent_save = None
        self._apply_request_at(at, step)
        if self._group is not None and self.stop_reason is None:
            self._votes = all_reduce_async(torch.tensor(self._take_requests()), self._group)

    def finish(self) -> None:
        """Wait for the all-reduce in flight; called when a loop ends."""
        self._votes.wait()

    def _take_requests(self) -> list[int]:
        self._sent_save, self._save = self._save, None
        return [int(self._stop is not None), int(self._sent_save is not None), self._at]

    def _apply_request_at(self, at: int, step: int) -> None:
        if at != self._done_at:
            self._done_at = 0
        if at == 0 or at == self._done_at or step < abs(at):
            return
        self._done_at = at
        reason = f"requested for step {abs(at)}" + (", which had passed" if step > abs(at) else "")
        if at > 0:
            self.stop_reason = self.stop_reason or reason
        else:
            self.save_reason = self.save_reason or reason


class SignalRequests:
    """Context manager that turns signals to this process into requests.

    SIGTERM, the first SIGINT, and SIGUSR1, with which batch systems announce the end of a job, save and stop. SIGUSR2
    saves and continues. A second SIGINT interrupts at once.

    Args:
        run_control: receives the requests.
    """

    def __init__(self, run_control: RunControl) -> None:
        self._run_control = run_control
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> None:
        # Python allows signal handlers in the main thread only; in another thread, signals are left to its owner.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
                self._previous[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        reason = f"received {signal.Signals(number).name}"
        if number == signal.SIGUSR2:
            self._run_control.request_save(reason)
            return
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self._run_control.request_stop(reason)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
