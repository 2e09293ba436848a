"""What people and batch systems ask of a run while it is at work: to stop, to save, to do either at a certain step.

Any rank may be asked. Each sends what it was asked in one small sum that travels while the next step is at work, so
that all ranks get the same answer at the end of the same step, and nothing waits for it.
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

ELSEWHERE = "another rank asked for it"


class RunControl:
    """What was asked of this rank, and what all ranks agreed on.

    Attributes:
        stop_reason: why the run is left after the step just counted; None when it goes on. The same on all ranks, but
            for the words.
        save_reason: likewise, why the step just counted is saved, beside what is due by number.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.clear()

    def clear(self) -> None:
        """Forget everything; for the start of a loop."""
        self.stop_reason: str | None = None
        self.save_reason: str | None = None
        self._stop: str | None = None
        self._save: str | None = None
        self._sent_save: str | None = None
        self._at = 0
        self._done_at = 0
        # On the host: looking at it must not wait for the device.
        self._votes = Pending(torch.zeros(3, dtype=torch.int64))

    # These three may be called by signal handlers.

    def stop(self, reason: str) -> None:
        """Ask for a stop as soon as all ranks know of it."""
        self._stop = reason

    def save(self, reason: str) -> None:
        """Ask for a checkpoint as soon as all ranks know of it."""
        self._save = reason

    def at(self, step: int) -> None:
        """Ask for a stop at `step`, or for a checkpoint at step -`step`; 0 takes it back. One rank only may ask so."""
        self._at = step

    def agree(self, step: int) -> None:
        """Find what is to be done now that `step` is counted; all ranks must call it at the end of every step.

        With one process that is what was asked by now, with several what had been asked by the end of the step before.
        """
        if self._group is None:
            votes = self._ask()
        else:
            votes = self._votes.wait().tolist()
        num_stops, num_saves, at = votes
        self.stop_reason = (self._stop or ELSEWHERE) if num_stops else None
        self.save_reason = (self._sent_save or ELSEWHERE) if num_saves else None
        self._sent_save = None
        self._look_at_step(at, step)
        if self._group is not None and self.stop_reason is None:
            self._votes = all_reduce_async(torch.tensor(self._ask()), self._group)

    def finish(self) -> None:
        """Wait for what is still under way; for the end of a loop."""
        self._votes.wait()

    def _ask(self) -> list[int]:
        self._sent_save, self._save = self._save, None
        return [int(self._stop is not None), int(self._sent_save is not None), self._at]

    def _look_at_step(self, at: int, step: int) -> None:
        if at != self._done_at:
            self._done_at = 0
        if at == 0 or at == self._done_at or step < abs(at):
            return
        self._done_at = at
        reason = f"asked for at step {abs(at)}" + (", which had passed" if step > abs(at) else "")
        if at > 0:
            self.stop_reason = self.stop_reason or reason
        else:
            self.save_reason = self.save_reason or reason


class RequestSignals:
    """While open, signals to this process become requests.

    SIGTERM, the first SIGINT, and SIGUSR1, by which batch systems warn of the end of a job: save and stop. SIGUSR2:
    save and go on. A second SIGINT interrupts at once.
    """

    def __init__(self, requests: RunControl) -> None:
        self._requests = requests
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> None:
        # Python allows signal handlers in the main thread only; elsewhere the owner of the thread decides.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
                self._previous[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        reason = f"received {signal.Signals(number).name}"
        if number == signal.SIGUSR2:
            self._requests.save(reason)
            return
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self._requests.stop(reason)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
